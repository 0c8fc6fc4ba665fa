"""The verbs of `python -m distill`, and what `launch/train.sh` runs on every rank."""

import argparse
import json
import os
import sys
from pathlib import Path

from distill.console import positive, quiet_libraries, run_on_ranks
from distill.errors import EXIT_DOES_NOT_FIT, BadInput, Problem


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one verb; the exit code."""
    args = _parser().parse_args(arguments)
    quiet_libraries()
    return run_on_ranks(lambda: args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distill", description="Distil large language models under DeepSpeed.")
    # The DeepSpeed launcher puts this before everything else; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train or resume a run (start it with launch/train.sh)")
    doctor = verbs.add_parser("doctor", help="check a run before paying for it")
    plan = verbs.add_parser("plan", help="what a run takes of each GPU of a cluster: memory, traffic, time")
    for verb in (train, doctor, plan):
        verb.add_argument("--config", required=True, help="YAML file, as in launch/recipes/")
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    train.set_defaults(run=_train)
    doctor.add_argument("--ranks", type=positive, help="check batch sizes and tensor parallelism for so many ranks")
    doctor.set_defaults(run=_doctor)
    _add_cluster(plan)
    plan.set_defaults(run=_plan)

    evaluate = verbs.add_parser("evaluate", help="measure models on held-out prompts against their teacher")
    evaluate.add_argument("--teacher", required=True, help="Hugging Face folder or hub id")
    evaluate.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="repeat for several")
    evaluate.add_argument("--data", type=Path, required=True, help="records of `make preprocess`")
    evaluate.add_argument("--out", type=Path, required=True, help="JSON file with figures and responses")
    evaluate.add_argument("--seeds", type=positive, default=1, help="sampled responses a prompt")
    evaluate.add_argument("--max-new-tokens", type=positive, default=256)
    evaluate.add_argument("--batch", type=positive, default=32, help="rows decoded together on one rank")
    evaluate.add_argument("--micro-batch", type=positive, default=8, help="rows scored together on one rank")
    evaluate.add_argument("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    evaluate.set_defaults(run=_evaluate)

    export = verbs.add_parser("export", help="copy a run's student out as a Hugging Face folder with a model card")
    export.add_argument("--run", dest="folder", type=Path, required=True, help="run folder")
    export.add_argument("--out", type=Path, required=True, help="folder of the model, made new")
    export.add_argument("--results", type=Path, help="Markdown of measured results, put into the model card")
    export.set_defaults(run=_export)
    return parser


def _add_cluster(plan: argparse.ArgumentParser) -> None:
    plan.description = (
        "Needs no GPU and no weights. Ends with 0 where the run fits, 3 where it does not, 2 on bad input."
    )
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--gpus-per-node", type=int, default=8)
    plan.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of each GPU; default: 80")
    rates = (
        ("--flops", 400, "TFLOP/s", "that a GPU reaches in training; default: 400, 40 %% of an H100's, A100: 125"),
        ("--bandwidth", 450, "GB/s", "that a GPU sends within its node; default: 450, an H100's NVLink, A100: 300"),
        ("--network", 50, "GB/s", "that a GPU sends to other nodes; default: 50, 400 Gbit/s a GPU, A100: 25"),
        ("--memory-bandwidth", 3350, "GB/s", "of a GPU's memory; default: 3350, an H100's, A100: 2039"),
    )
    for name, default, unit, text in rates:
        plan.add_argument(name, type=float, default=default, metavar=unit, help=text)
    plan.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: ranks on processors; default: cuda"
    )
    plan.add_argument("--json", type=Path, help="write the plan here too, in bytes and seconds")


def _train(args: argparse.Namespace) -> None:
    from distill.config import load
    from distill.fingerprint import fingerprint
    from distill.launching.variables import forget_file
    from distill.models.downloads import bring, models_of
    from distill.rollcall import assemble
    from distill.topology import start
    from distill.vigil.watch import keep

    roll = assemble()
    vigil = keep(roll.store, roll.rank, roll.hosts)
    forget_file()  # all hosts have read it
    config = roll.together(lambda: load(args.config, args.overrides))
    roll.compare(roll.together(lambda: fingerprint(config)))
    roll.in_turn(lambda: _examine(config, int(os.environ["WORLD_SIZE"])))
    bring(models_of(config), roll)
    vigil.expect_progress(config.fault.stall_timeout, config.run.folder)
    topology = start(config.tensor_parallel, config.parallel.timeout_minutes)
    from distill.trainer import train

    train(config, topology)


def _doctor(args: argparse.Namespace) -> None:
    from distill.config import load

    _examine(load(args.config, args.overrides), args.ranks)
    print("doctor: nothing wrong found")


def _plan(args: argparse.Namespace) -> int:
    from distill.config import load
    from distill.planning.advice import deepspeed_choices, knobs
    from distill.planning.plan import Plan
    from distill.planning.setup import GIB, Cluster, prepare
    from distill.planning.table import as_json, describe

    if args.json:
        _check_file_to_write("--json", args.json)
    cluster = Cluster(
        nodes=args.nodes,
        per_node=args.gpus_per_node,
        memory=args.gpu_memory * GIB,
        flops=args.flops * 1e12,
        bandwidth=args.bandwidth * 1e9,
        network=args.network * 1e9,
        memory_bandwidth=args.memory_bandwidth * 1e9,
        device=args.device,
    )
    plan = Plan.of(prepare(load(args.config, args.overrides), cluster))
    found = plan, [] if plan.fits else knobs(plan), deepspeed_choices(plan)
    print(describe(*found))
    if args.json:
        args.json.write_text(json.dumps(as_json(*found), indent=1) + "\n", encoding="utf-8")
    return 0 if plan.fits else EXIT_DOES_NOT_FIT


def _check_file_to_write(field: str, path: Path, makes_folder: bool = False) -> None:
    """Before hours of work end with no place for it."""
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise BadInput(Problem(field, str(path), "is a folder", "give the path of a file"))
    if not nearest.is_dir() or not (makes_folder or nearest == path.absolute().parent):
        raise BadInput(Problem(field, str(path), "its folder does not exist", "make it first"))


def _examine(config: object, world_size: int | None) -> None:
    from distill.config import Config
    from distill.doctor import examine

    assert isinstance(config, Config)
    report = examine(config, world_size)
    for notice in report.notices if os.environ.get("RANK", "0") == "0" else []:
        print(f"note: {notice}", file=sys.stderr)
    if report.problems:
        raise BadInput(report.problems)


def _evaluate(args: argparse.Namespace) -> None:
    from distill.config import RolloutSettings, model_at
    from distill.evaluation.runner import evaluate
    from distill.evaluation.table import terminal_table
    from distill.models.downloads import bring
    from distill.rollcall import assemble

    _check_file_to_write("--out", args.out, makes_folder=True)
    models = {}
    for item in args.model:
        name, equals, path = item.partition("=")
        if not (equals and name and path):
            raise BadInput(Problem("--model", item, "not of the form NAME=DIR", "e.g. --model student=runs/x/student"))
        if name in models:
            raise BadInput(Problem("--model", item, f"another one is called {name!r}", "give each a name of its own"))
        models[name] = model_at(path, "--model", args.allow_pickle)
    teacher = model_at(args.teacher, "--teacher", args.allow_pickle)
    roll = assemble()  # to the end: other ranks read from rank 0's store when it has gone on
    bring({"--teacher": teacher} | {f"--model {name}": model for name, model in models.items()}, roll)
    settings = RolloutSettings(alpha=0, max_new_tokens=args.max_new_tokens, batch=args.batch)
    report = evaluate(teacher, models, args.data, args.out, settings, args.seeds, args.micro_batch)
    if os.environ["RANK"] == "0":
        print(terminal_table(report))


def _export(args: argparse.Namespace) -> None:
    from distill.export import export

    if args.results and not args.results.is_file():
        raise BadInput(Problem("--results", str(args.results), "no such file", "give a Markdown file"))
    try:
        results = args.results.read_text(encoding="utf-8") if args.results else ""
    except (OSError, ValueError) as error:
        raise BadInput(Problem("--results", str(args.results), f"cannot be read ({error})", "give Markdown")) from None
    export(args.folder, args.out, results)
    print(f"{args.out}: ready for AutoModelForCausalLM.from_pretrained")
