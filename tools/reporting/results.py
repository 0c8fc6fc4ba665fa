"""An evaluation's figures: a table a set, the paired differences, curves by position, lengths."""

from collections.abc import Mapping, Sequence

import numpy as np

from distill.evaluation.subjects import TEACHER
from distill.evaluation.table import COLUMNS
from tools.reporting.charts import Chart, Histogram, Line, LineChart, bars, bins
from tools.reporting.evaluations import Estimate, Evaluation
from tools.reporting.markup import NONE, esc, number, table, tag, whisker
from tools.reporting.naming import FIGURES

Colours = Mapping[str, int]
_POSITION = "position in the response, tokens"


def columns(evaluation: Evaluation, set_name: str) -> list[str]:
    """The figures that any model has on a set."""
    return [key for key in COLUMNS if any(evaluation.figure(model, set_name, key) for model in evaluation.models)]


def best_student(evaluation: Evaluation, set_name: str, key: str) -> str | None:
    """The one whose difference from each other student has an interval on the better side of 0, if there is one."""
    direction = 1 if "↑" in COLUMNS[key][0] else -1 if "↓" in COLUMNS[key][0] else 0
    students = [name for name in evaluation.students if evaluation.figure(name, set_name, key)]
    for one in students if direction and len(students) > 1 else []:
        found = [evaluation.difference(one, other, set_name, key) for other in students if other != one]
        if all(d is not None and d.is_sure and d.value * direction > 0 for d in found):
            return one
    return None


def figures_table(evaluation: Evaluation, set_name: str, colours: Colours) -> str:
    """Models by figures, with intervals; the teacher stands last."""
    shown = columns(evaluation, set_name)
    header = ["model", *(f'<th title="{esc(FIGURES[key])}">{esc(COLUMNS[key][0])}</th>' for key in shown)]
    best = {key: best_student(evaluation, set_name, key) for key in shown}
    rows = []
    for model in [*evaluation.students, *(name for name in evaluation.models if name == TEACHER)]:
        cells = [tag(model, colours[model])]
        for key in shown:
            figure, decimals = evaluation.figure(model, set_name, key), COLUMNS[key][1]
            cells.append(_cell(figure, decimals, _scale(evaluation, set_name, key), colours[model], best[key] == model))
        rows.append(cells)
    return table(header, rows, "figures")


def _scale(evaluation: Evaluation, set_name: str, key: str) -> tuple[float, float]:
    found = [one for model in evaluation.models if (one := evaluation.figure(model, set_name, key))]
    limits = [value for one in found for value in (one.low, one.high) if value == value]
    return (min(limits), max(limits)) if limits else (0.0, 1.0)


def _cell(figure: Estimate | None, decimals: int, scale: tuple[float, float], colour: int, best: bool) -> str:
    if figure is None:
        return NONE
    limits = f"{number(figure.low, decimals)} – {number(figure.high, decimals)}"
    content = f"<b>{number(figure.value, decimals)}</b><small>{limits}</small>{whisker(figure, *scale, colour)}"
    return f"<td{' class=best' if best else ''}>{content}</td>"


def differences_table(evaluation: Evaluation, set_name: str) -> str:
    """Each two students; nothing where there are none."""
    pairs = [pair for pair in evaluation.content.differences if pair.set == set_name]
    shown = [key for key in COLUMNS if any(key in pair.figures for pair in pairs)]
    if not shown:
        return ""
    reach = {key: _reach([pair.figures[key] for pair in pairs if key in pair.figures]) for key in shown}
    rows = []
    for pair in pairs:
        cells = [f"{esc(pair.model)} − {esc(pair.minus)}"]
        for key in shown:
            found, decimals = pair.figures.get(key), COLUMNS[key][1]
            if found is None:
                cells.append(NONE)
                continue
            limits = f"{number(found.low, decimals, True)} … {number(found.high, decimals, True)}"
            drawn = whisker(found, -reach[key], reach[key], -1, zero=True)
            content = f"<b>{number(found.value, decimals, True)}</b><small>{limits}<br>{_p(found.p)}</small>{drawn}"
            cells.append(f"<td class={'sure' if found.is_sure else 'unsure'}>{content}</td>")
        rows.append(cells)
    header = ["difference", *(f'<th title="{esc(FIGURES[key])}">{esc(COLUMNS[key][0])}</th>' for key in shown)]
    return table(header, rows, "figures differences")


def _reach(found: Sequence[Estimate]) -> float:
    return max((abs(value) for one in found for value in (one.low, one.high) if value == value), default=1.0) or 1.0


def _p(p: float) -> str:
    return "p ≤ 0.001" if p <= 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def position_charts(evaluation: Evaluation, set_name: str, colours: Colours) -> list[Chart]:
    """How fidelity changes along a response; of the teacher, for which all is 0, nothing."""
    found = {
        model: curves
        for model in evaluation.students
        if (curves := evaluation.content.curves.get(model, {}).get(set_name)) and curves.rows
    }

    def lines(key: str, label: str = "", dashed: bool = False) -> list[Line]:
        values = {model: np.array(getattr(curves, key), dtype=np.float64) for model, curves in found.items()}
        return [
            Line(f"{model}{label}", colours[model], np.arange(1.0, len(y) + 1), y, dashed=dashed)
            for model, y in values.items()
        ]

    if not found:
        return []
    both = lines("forward_kl_after_own", ", after its own text")
    both += lines("forward_kl_after_teachers", ", after the teacher’s", dashed=True)
    at, nats = f"{evaluation.name}/{set_name}", "nats"
    return [
        LineChart(f"{at}/reverse_kl", "KL(q‖p) after own text", nats, _POSITION, lines("reverse_kl_after_own")),
        LineChart(f"{at}/forward_kl", "KL(p‖q) after own text, teacher’s (dashed)", nats, _POSITION, both),
        LineChart(
            f"{at}/excess_error",
            "Excess accumulated error",
            "percent",
            _POSITION,
            lines("excess_accumulated_error"),
        ),
        LineChart(f"{at}/rows", "Responses that reach it", "responses", _POSITION, lines("rows")),
    ]


def length_chart(evaluation: Evaluation, set_name: str, colours: Colours) -> list[Chart]:
    """The distribution of response lengths, where the scores are at hand."""
    found = evaluation.lengths.get(set_name)
    if not found:
        return []
    edges = bins(list(found.values()), whole=True)
    series = [bars(model, colours[model], lengths, edges) for model, lengths in found.items()]
    key = f"{evaluation.name}/{set_name}/length"
    return [Histogram(key, "Response length", "share of responses", "tokens, EOS included", edges, series)]
