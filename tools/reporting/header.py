"""The head of the page: which runs, what came of them, what to beware of."""

from tools.reporting import svg
from tools.reporting.costs import TOTAL_TIME
from tools.reporting.findings import findings, headline
from tools.reporting.markup import esc, number, tag
from tools.reporting.report import Report
from tools.reporting.runs import Run

_BEST = (("valid/rouge_l", "best Rouge-L", 1, 1), ("valid/loss", "lowest validation loss", -1, 3))
"""Metric, what its best value is called, whether it is the highest or the lowest, decimals."""
_MINUTE, _HOUR = 60, 3600


def header(report: Report, title: str) -> str:
    """Everything above the first section."""
    notes = "".join(
        f"<li class={'warning' if one.is_warning else 'note'}><b>{esc(one.subject)}</b> {esc(one.text)}</li>"
        for one in findings(report.runs, report.evaluations)
    )
    cards = "".join(_card(run, report.colours[run.name]) for run in report.runs)
    said = esc(headline(report.runs, report.evaluations))
    return (
        f"<p class=kicker>Distillation report</p><h1>{esc(title)}</h1><p class=headline>{said}</p>"
        f"<div class=cards>{cards}</div>{f'<ul class=findings>{notes}</ul>' if notes else ''}"
    )


def _card(run: Run, colour: int) -> str:
    facts = [*_models(run), ("steps", _steps(run))]
    if TOTAL_TIME in run.curves:
        facts.append(("training time", _duration(float(run.curves[TOTAL_TIME].values[-1]))))
    for metric, label, sign, decimals in _BEST:
        if curve := run.curves.get(metric):
            place = int((sign * curve.values).argmax())
            facts.append((label, f"{number(float(curve.values[place]), decimals)} at step {curve.steps[place]:g}"))
    objective = run.setting("objective", "name") or "objective not on record"
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    head = f"<h3>{tag(run.name, colour)}</h3><p class=objective>{esc(objective)}</p>"
    return f'<div class="card {svg.css(colour)}">{head}<dl>{listed}</dl></div>'


def _models(run: Run) -> list[tuple[str, str]]:
    paths = [(role, run.setting(role, "path")) for role in ("student", "teacher")]
    return [(role, f"<code>{esc(path).replace('/', '/<wbr>')}</code>") for role, path in paths if path]


def _steps(run: Run) -> str:
    planned = run.setting("optim", "steps")
    return f"{run.steps} of {esc(planned)}" if planned not in (None, run.steps) else str(run.steps)


def _duration(seconds: float) -> str:
    if seconds < 1.5 * _MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE:.1f} min" if seconds < 1.5 * _HOUR else f"{seconds / _HOUR:.1f} h"
