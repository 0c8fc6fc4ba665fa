"""Figures of the parts that must be fast, as ratios taken within one run.

python -m tools.benchmark loss --json loss.json
python -m tools.benchmark rollout --json rollout.json
python -m tools.benchmark step --json step.json
python -m tools.benchmark preprocess --json preprocess.json
python -m tools.benchmark scale --json scale.json
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from distill.console import positive, quiet_libraries
from distill.data.templates import TEMPLATES
from tools.benchmarks import loss, preprocess, rollout, scale, step


def main() -> int:
    """Command line."""
    args = _parser().parse_args()
    quiet_libraries()
    figures = args.run(args)
    _show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _show(figures: Mapping[str, object]) -> None:
    for name, value in figures.items():
        if isinstance(value, list):  # a row for each layout
            for row in value:
                print()
                _show(row)
        else:
            print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True, metavar="WHAT")

    of_loss = what.add_parser("loss", help="the loss through the lm_head", description=loss.__doc__)
    of_loss.add_argument("--tokens", type=positive, default=2048)
    of_loss.add_argument("--hidden", type=positive, default=576)
    of_loss.add_argument("--vocab", type=positive, default=49152)
    of_loss.set_defaults(run=loss.run)

    of_rollout = what.add_parser("rollout", help="teacher-mixed sampling", description=rollout.__doc__)
    _add_rollout_sizes(of_rollout)
    of_rollout.add_argument("--alpha", type=float, default=0.2, help="the teacher's share")
    of_rollout.add_argument("--one-process", action="store_true", help="leave out the figures of two ranks")
    of_rollout.set_defaults(run=rollout.run)

    of_step = what.add_parser("step", help="a whole on-policy training step", description=step.__doc__)
    _add_rollout_sizes(of_step)
    of_step.add_argument("--micro-batch", type=positive, default=8)
    of_step.set_defaults(run=step.run)

    of_preprocess = what.add_parser("preprocess", help="tokenising raw text", description=preprocess.__doc__)
    of_preprocess.add_argument("--megabytes", type=float, default=16.0, help="size of the text made up for each kind")
    of_preprocess.add_argument("--data", type=Path, help="a jsonl or txt file to tokenise instead, of one --kind")
    of_preprocess.add_argument("--kind", choices=("instructions", "text"), help="default: both")
    of_preprocess.add_argument("--tokenizer", help="Hugging Face folder or id; default: trained on the text")
    of_preprocess.add_argument("--template", choices=TEMPLATES, default="alpaca")
    of_preprocess.add_argument("--workers", type=positive, help="processes; default: one a core")
    of_preprocess.add_argument("--seed", type=int, default=0)
    of_preprocess.set_defaults(run=preprocess.run)

    of_scale = what.add_parser(
        "scale", help="memory and traffic of 1, 2 and 4 ranks against the plan", description=scale.__doc__
    )
    of_scale.add_argument(
        "--layouts",
        type=scale.layouts,
        default=scale.LAYOUTS,
        metavar="RANKSxTP,…",
        help="default: 1x1,2x1,2x2,4x1,4x2",
    )
    of_scale.add_argument("--prompt", type=positive, default=64, help="tokens of every prompt")
    of_scale.add_argument("--layers", type=positive, help="of both models; default: 8 and 12")
    of_scale.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run")
    of_scale.set_defaults(run=scale.run)

    for each in (of_loss, of_rollout, of_step, of_preprocess):
        each.add_argument("--repeats", type=positive, default=5, help="counted rounds; medians are reported")
    for each in (of_loss, of_rollout, of_step, of_preprocess, of_scale):
        each.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def _add_rollout_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", type=Path, help="model folder; default: SmolLM2-135M's shape, random weights")
    parser.add_argument("--student", type=Path, help="model folder; default: a third of the teacher's layers")
    parser.add_argument("--rows", type=positive, default=16, help="prompts in the batch")
    parser.add_argument("--prompt", type=positive, default=32, help="the longest prompt; the shortest is half of it")
    parser.add_argument("--new-tokens", type=positive, default=64)
    parser.add_argument("--seed", type=int, default=0)


if __name__ == "__main__":
    sys.exit(main())
