"""The verbs of `python -m distill`, and what `launch/train.sh` runs on every rank."""

import argparse
import os
import sys
from pathlib import Path

from distill.console import positive, quiet_libraries, run_on_ranks
from distill.errors import BadInput, Problem


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
    for verb in (train, doctor):
        verb.add_argument("--config", required=True, help="YAML file, as in launch/recipes/")
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    train.set_defaults(run=_train)
    doctor.add_argument("--ranks", type=positive, help="check batch sizes and tensor parallelism for so many ranks")
    doctor.set_defaults(run=_doctor)

    evaluate = verbs.add_parser("evaluate", help="measure models on held-out prompts against their teacher")
    evaluate.add_argument("--teacher", required=True, help="Hugging Face folder or hub id")
    evaluate.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="repeat for several")
    evaluate.add_argument("--data", type=Path, required=True, help="records of `make preprocess`")
    evaluate.add_argument("--out", type=Path, required=True, help="JSON file with figures and responses")
    evaluate.add_argument("--seeds", type=positive, default=1, help="sampled responses a prompt")
    evaluate.add_argument("--max-new-tokens", type=positive, default=256)
    evaluate.add_argument("--batch", type=positive, default=32, help="rows decoded together on one rank")
    evaluate.add_argument("--micro-batch", type=positive, default=8, help="rows scored together on one rank")
    evaluate.set_defaults(run=_evaluate)

    export = verbs.add_parser("export", help="copy a run's student out as a Hugging Face folder with a model card")
    export.add_argument("--run", dest="folder", type=Path, required=True, help="run folder")
    export.add_argument("--out", type=Path, required=True, help="folder of the model, made new")
    export.add_argument("--results", type=Path, help="Markdown of measured results, put into the model card")
    export.set_defaults(run=_export)
    return parser


def _train(args: argparse.Namespace) -> None:
    from distill.config import load
    from distill.fingerprint import fingerprint
    from distill.launching.variables import forget_file
    from distill.models.downloads import bring, models_of
    from distill.rollcall import assemble
    from distill.topology import start

    roll = assemble()
    forget_file()  # all hosts have read it
    config = roll.together(lambda: load(args.config, args.overrides))
    roll.compare(roll.together(lambda: fingerprint(config)))
    roll.in_turn(lambda: _examine(config, int(os.environ["WORLD_SIZE"])))
    bring(models_of(config), roll)
    topology = start(config.parallel.student_tp, config.parallel.timeout_minutes)
    from distill.trainer import train

    train(config, topology)


def _doctor(args: argparse.Namespace) -> None:
    from distill.config import load

    _examine(load(args.config, args.overrides), args.ranks)
    print("doctor: nothing wrong found")


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
    from distill.config import RolloutSettings
    from distill.evaluation.runner import evaluate
    from distill.evaluation.table import terminal_table
    from distill.models.downloads import bring
    from distill.rollcall import assemble

    models = {}
    for item in args.model:
        name, equals, path = item.partition("=")
        if not equals:
            raise BadInput(Problem("--model", item, "not of the form NAME=DIR", "e.g. --model student=runs/x/student"))
        models[name] = path
    bring({"--teacher": args.teacher} | {f"--model {name}": path for name, path in models.items()}, assemble())
    settings = RolloutSettings(alpha=0, max_new_tokens=args.max_new_tokens, batch=args.batch)
    report = evaluate(args.teacher, models, args.data, args.out, settings, args.seeds, args.micro_batch)
    if os.environ["RANK"] == "0":
        print(terminal_table(report))


def _export(args: argparse.Namespace) -> None:
    from distill.export import export

    if args.results and not args.results.is_file():
        raise BadInput(Problem("--results", str(args.results), "no such file", "give a Markdown file"))
    results = args.results.read_text(encoding="utf-8") if args.results else ""
    export(args.folder, args.out, results)
    print(f"{args.out}: ready for AutoModelForCausalLM.from_pretrained")
