"""One self-contained HTML page about one or more runs: results, curves, responses side by side, settings, costs.

python -m tools.report runs/x runs/y --evaluation runs/evaluation --out report.html --png figures
"""

import argparse
import sys
from pathlib import Path

from distill.errors import EXIT_BAD_INPUT, BadInput, Problem
from tools.reporting.evaluations import read_evaluation
from tools.reporting.page import page
from tools.reporting.png import write_pngs
from tools.reporting.report import Report
from tools.reporting.runs import read_runs


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="HTML file")
    parser.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder of `python -m distill evaluate`; may be given several times",
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="write every figure as PNG too, for papers")
    args = parser.parse_args()
    try:
        _check(args.out, args.png)
        report = Report(read_runs(args.runs), [read_evaluation(folder) for folder in args.evaluation])
        args.out.write_text(page(report), encoding="utf-8", errors="replace")
        written = write_pngs(report.groups, args.png) if args.png else []
    except BadInput as error:
        print(f"report: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(args.out)
    if written:
        print(f"{args.png}: {len(written)} figures")
    return 0


def _check(out: Path, png: Path | None) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        wrong = "is a folder" if out.is_dir() else "its folder does not exist"
        raise BadInput(Problem("--out", str(out), wrong, "give the path of an HTML file"))
    if png and png.exists() and not png.is_dir():
        raise BadInput(Problem("--png", str(png), "is a file", "give a folder"))


if __name__ == "__main__":
    sys.exit(main())
