"""One self-contained HTML page about one or more runs: curves, figures, responses side by side.

python -m tools.report RUN [RUN …] --out report.html [--evaluation evaluation.json]
"""

import argparse
import html
import io
import json
import sys
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from distill.errors import EXIT_BAD_INPUT, BadInput, Problem
from distill.evaluation.table import rows
from distill.telemetry import METRICS

_COLOURS = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed"]
_SAMPLES_SHOWN = 12
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --card: #f9fafb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --paper: #111827; --card: #1f2937 }
  svg { background: #ffffff; border-radius: 6px }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px;
  margin: 2rem auto; padding: 0 1.5rem }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.6rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
p.lead { color: var(--soft); margin-top: 0 }
table { border-collapse: collapse; width: 100% } td, th { padding: .45rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem }
.curves svg { width: 100%; height: auto }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0 }
.sample b.prompt { display: block; margin-bottom: .6rem; white-space: pre-wrap }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: .9rem; font-size: .88rem }
.answers h4 { margin: 0 0 .2rem; color: var(--soft); font-weight: 600 }
.answers p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
"""


def read_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a run as (step, value) pairs.

    Raises:
        BadInput: not a run folder.
    """
    path = run / METRICS
    if not path.is_file():
        raise BadInput(Problem("RUN", str(run), f"no {METRICS} in it", "give the folder of a run"))
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            step = record.pop("step")
            found = [(name, (int(step), float(value))) for name, value in record.items()]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # the last line of a run that was killed while it wrote
        for name, point in found:
            curves[name].append(point)
    return curves


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `distill evaluate` has written.

    Raises:
        BadInput: no such file, or another one.
    """
    if not path.is_file():
        raise BadInput(Problem("--evaluation", str(path), "no such file", "run `distill evaluate` first"))
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        rows(found["figures"])
        for sample in found["samples"]:
            _sample(sample)
        int(found["seeds"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        mend = "give what `distill evaluate --out` has written"
        raise BadInput(Problem("--evaluation", str(path), "is no evaluation", mend)) from None
    return found


def page(runs: dict[str, Path], evaluation: dict[str, Any] | None) -> str:
    """The whole document."""
    parts = [f"<h1>{html.escape(' · '.join(runs))}</h1>", '<p class="lead">distillation report</p>']
    if evaluation:
        seeds = evaluation["seeds"]
        parts.append("<h2>Held-out figures</h2>")
        parts.append(f"<p class='lead'>{len(evaluation['samples'])} prompts, {seeds} sampled responses each</p>")
        parts.append(_table(evaluation["figures"]))
    parts.append(f'<h2>Training curves</h2><div class="curves">{_curves(runs)}</div>')
    if evaluation:
        parts.append("<h2>Responses side by side</h2>")
        parts += [_sample(sample) for sample in evaluation["samples"][:_SAMPLES_SHOWN]]
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>distill</title><style>{_STYLE}</style>{body}</html>\n"
    )


def _table(figures: dict[str, dict[str, float]]) -> str:
    header, *body = rows(figures)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _curves(runs: dict[str, Path]) -> str:
    metrics = {name: read_metrics(path) for name, path in runs.items()}
    names = sorted({metric for curves in metrics.values() for metric in curves})
    colours = dict(zip(runs, cycle(_COLOURS), strict=False))
    return "".join(_figure(name, {run: c[name] for run, c in metrics.items() if name in c}, colours) for name in names)


def _figure(name: str, curves: dict[str, list[tuple[int, float]]], colours: dict[str, str]) -> str:
    figure, axes = plt.subplots(figsize=(4.2, 2.6), layout="constrained")
    for run, points in curves.items():
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps, values, color=colours[run], label=run, linewidth=1.6, marker="o" if len(steps) < 8 else None, ms=4
        )
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(colours) > 1:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _sample(sample: dict[str, str]) -> str:
    answers = {"reference": sample["reference"]} | {k: v for k, v in sample.items() if k not in ("prompt", "reference")}
    columns = "".join(f"<div><h4>{html.escape(k)}</h4><p>{html.escape(v)}</p></div>" for k, v in answers.items())
    prompt = html.escape(sample["prompt"])
    return f'<div class="sample"><b class="prompt">{prompt}</b><div class="answers">{columns}</div></div>'


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="HTML file")
    parser.add_argument("--evaluation", type=Path, help="JSON of `python -m distill evaluate`")
    args = parser.parse_args()
    try:
        if args.out.is_dir() or not args.out.absolute().parent.is_dir():
            wrong = "is a folder" if args.out.is_dir() else "its folder does not exist"
            raise BadInput(Problem("--out", str(args.out), wrong, "give the path of an HTML file"))
        evaluation = read_evaluation(args.evaluation) if args.evaluation else None
        names = [run.name for run in args.runs]
        runs = {run.name if names.count(run.name) == 1 else str(run): run for run in args.runs}
        args.out.write_text(page(runs, evaluation), encoding="utf-8")
    except BadInput as error:
        print(f"report: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
