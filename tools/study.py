"""The studies of RESULTS.md. What is finished is reused, what was killed goes on.

python -m tools.study stories --model models/stories15M --seeds 1 2 3 --jobs 2
python -m tools.study dolly --data processed --seeds 1
python -m tools.study dolly --data processed --seeds 1 --layers 20 --methods sft kd seqkd minillm

On a processor small models train fastest side by side, a core each.
"""

import argparse
import json
import sys
from pathlib import Path

from distill.console import positive
from distill.errors import EXIT_BAD_INPUT
from tools.stages import Ledger, StageFailed
from tools.studies import dolly, stories
from tools.studies.collate import collate, table


def main() -> int:
    """Command line."""
    args = _parser().parse_args()
    study = {"stories": stories, "dolly": dolly}[args.study]
    missing = [path for path in _needed(args) if not path.exists()]
    if missing:
        print(f"study: no {missing[0]}; see RESULTS.md for where it comes from", file=sys.stderr)
        return EXIT_BAD_INPUT
    study.FOLDER.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(study.FOLDER / "stages.json")
    evaluations = [study.FOLDER / f"evaluation-{seed}" for seed in args.seeds]
    target = study.FOLDER / "study.json"
    if args.study == "stories":
        chain = stories.stages(args.seeds, args.ranks, args.model)
    else:
        chain = dolly.stages(args.seeds, args.ranks, Path(args.data), args.prompts, args.layers, args.methods)
        evaluations = [dolly.tagged("evaluation", args.layers, seed) for seed in args.seeds]
        target = dolly.tagged("study", args.layers).with_suffix(".json")
    try:
        for stages in chain:
            ledger.run_together(stages, args.jobs)
    except StageFailed as error:
        print(f"study: {error}; mend it and run the same command again", file=sys.stderr)
        return error.code
    collated = collate(evaluations)
    costs = {name: {key: done[key] for key in ("seconds", "peak_gib")} for name, done in ledger.finished.items()}
    content = {"seeds": args.seeds, "figures": collated, "stages": costs}
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name in study.SETS:
        print(f"\n{name}\n{table(collated, name, study.METRICS)}")
    print(f"\n{target} has all figures")
    return 0


def _needed(args: argparse.Namespace) -> list[Path]:
    if args.study == "stories":
        return [Path(args.model) / "config.json"]
    return [Path(args.data) / "dolly/train.jsonl", *(Path(args.data) / name / "test.jsonl" for name in dolly.SETS)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    of_stories = studies.add_parser("stories", help="stories15M into half its layers")
    of_stories.add_argument("--model", required=True, help="folder of stories15M")
    of_dolly = studies.add_parser("dolly", help="SmolLM2-135M into a third of its layers")
    of_dolly.add_argument("--data", required=True, help="MiniLLM's processed data: dolly/, self-inst/, vicuna/")
    of_dolly.add_argument("--prompts", type=positive, default=1000, help="of Dolly, to train on")
    of_dolly.add_argument("--layers", type=positive, default=dolly.LAYERS, help="of the teacher's 30, for the student")
    of_dolly.add_argument("--methods", nargs="+", choices=dolly.VARIANTS, default=[*dolly.VARIANTS], metavar="METHOD")
    for one in (of_stories, of_dolly):
        one.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
        one.add_argument("--ranks", type=positive, default=1, help="DeepSpeed ranks of each stage")
        one.add_argument("--jobs", type=positive, default=1, help="stages at a time, where they do not need each other")
    return parser


if __name__ == "__main__":
    sys.exit(main())
