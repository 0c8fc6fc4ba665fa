"""The verbs of `python -m distill`, and what `launch/train.sh` runs on every rank."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distill.console import above_0, natural, not_below_0, positive, quiet_libraries, run_on_ranks
from distill.errors import EXIT_DOES_NOT_FIT, BadInput, Problem

if TYPE_CHECKING:
    from distill.config import ModelSettings


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one verb; the exit code."""
    args = _parser().parse_args(arguments)
    if args.run is not _judge:  # which loads none
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

    evaluate = verbs.add_parser("evaluate", help="measure models on the sets of a suite, beside their teacher")
    evaluate.add_argument("--suite", type=Path, required=True, help="YAML file, as in launch/suites/")
    evaluate.add_argument(
        "--model", action="append", default=[], metavar="[NAME=]DIR", help="Hugging Face folder or hub id; repeat"
    )
    evaluate.add_argument("--out", type=Path, required=True, help="folder of responses, scores and evaluation.json")
    evaluate.add_argument("--allow-pickle", action="store_true", help="read models that are not safetensors")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the suite")
    evaluate.set_defaults(run=_evaluate)

    _add_judge(verbs.add_parser("judge", help="let another model judge the responses of an evaluation"))

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


def _add_judge(judge: argparse.ArgumentParser) -> None:
    judge.description = (
        "Without --pair each response is scored beside its reference. Ends with 0, with 75 where --max-cost ended it, "
        "1 where verdicts are missing or the judge stopped answering, 2 on bad input; the same command goes on."
    )
    judge.add_argument("folder", metavar="DIR", type=Path, help="folder --out of `distill evaluate`")
    judge.add_argument("--judge-url", required=True, metavar="URL", help="OpenAI-compatible, as in https://host/v1")
    judge.add_argument("--judge-model", required=True, metavar="NAME", help="what the server calls it")
    judge.add_argument(
        "--pair", nargs=2, action="append", default=[], metavar=("A", "B"), help="which model responds better; repeat"
    )
    for name, kind, text in (
        ("model", str, "responses of this one"),
        ("set", str, "to this"),
        ("seed", int, "of this"),
    ):
        judge.add_argument(f"--{name}", type=kind, action="append", default=[], help=f"{text}; repeat; default: all")
    judge.add_argument(
        "--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable of the key"
    )
    judge.add_argument("--judge-max-tokens", type=positive, default=512, metavar="N", help="of a reply; default: 512")
    judge.add_argument("--judge-seed", type=int, default=0, metavar="N", help="default: 0; the temperature is 0")
    judge.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="field of requests; null: leave it out; repeat",
    )
    judge.add_argument("--judge-timeout", type=above_0, default=120, metavar="S", help="seconds; default: 120")
    judge.add_argument("--judge-max-retries", type=natural, default=5, metavar="N", help="after failures; default: 5")
    judge.add_argument("--asks", type=positive, default=3, metavar="N", help="for a clear reply, at most; default: 3")
    judge.add_argument("--concurrency", type=positive, default=8, metavar="N", help="requests at once; default: 8")
    judge.add_argument("--requests-per-minute", type=above_0, metavar="N", help="retries included; default: no limit")
    judge.add_argument("--tokens-per-minute", type=above_0, metavar="N", help="prompts and replies; default: no limit")
    judge.add_argument("--price-in", type=not_below_0, metavar="X", help="of a million tokens of prompts")
    judge.add_argument("--price-out", type=not_below_0, metavar="X", help="of a million tokens of replies")
    judge.add_argument("--max-cost", type=above_0, metavar="X", help="of this command, in the prices' currency")
    judge.set_defaults(run=_judge)


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


def _check_file_to_write(field: str, path: Path) -> None:
    """Before hours of work end with no place for it."""
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise BadInput(Problem(field, str(path), "is a folder", "give the path of a file"))
    if not nearest.is_dir() or nearest != path.absolute().parent:
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
    from distill.evaluation.runner import evaluate
    from distill.evaluation.subjects import TEACHER
    from distill.evaluation.suite import load_suite
    from distill.evaluation.table import terminal_tables
    from distill.models.downloads import bring
    from distill.rollcall import assemble

    if args.out.exists() and not args.out.is_dir():
        raise BadInput(Problem("--out", str(args.out), "is a file", "give the path of a folder"))
    suite = load_suite(args.suite, args.overrides)
    models = _models(args.model, args.allow_pickle)
    if suite.teacher and TEACHER in models:
        raise BadInput(Problem("--model", TEACHER, "is what the suite's teacher is called", "give it another name"))
    if not (models or suite.teacher):
        raise BadInput(Problem("--model", None, "there is no model to measure", "e.g. --model student=runs/x/student"))
    roll = assemble()  # to the end: other ranks read from rank 0's store when it has gone on
    wanted = {"teacher.path": suite.teacher} if suite.teacher else {}
    bring(wanted | {f"--model {name}": model for name, model in models.items()}, roll)
    content = evaluate(suite, models, args.out)
    if content:
        print(terminal_tables(content))


def _judge(args: argparse.Namespace) -> None:
    from distill.evaluation.judge.command import judge

    judge(args)


def _models(given: list[str], allow_pickle: bool) -> "dict[str, ModelSettings]":
    """By name; one without a name has its folder's, and that of a run for its student."""
    from distill.config import model_at

    models = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals:
            path = item
            parts = Path(path).parts
            name = parts[-2] if len(parts) > 1 and parts[-1] == "student" else parts[-1] if parts else ""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or not path:
            mend = "e.g. --model student=runs/x/student"
            raise BadInput(Problem("--model", item, "needs a name of letters, digits, '_', '-' and '.'", mend))
        if name in models:
            raise BadInput(Problem("--model", item, f"another one is called {name!r}", "give each a name of its own"))
        models[name] = model_at(path, "--model", allow_pickle)
    return models


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
