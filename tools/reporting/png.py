"""Charts as PNG files for papers: one column wide, 300 dpi, white, with their own legend."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.reporting.charts import Chart, Group, Histogram, LineChart, Stack
from tools.reporting.svg import PALETTE

_INK = "#555555"
_COLOURS = ("#0a6ab6", "#d2540b", "#078a68", "#a8478f", "#b98200", "#3b9fd1", "#77563b")
_PHASES = ("#7fb7dd", "#4a9f8e", "#d9c46c", "#c9707e", "#9a6fb0", "#b9bec3")
_SIZE = (3.35, 2.3)
_DPI = 300
_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_LONGEST_NAME = 100
_LEGEND_COLUMNS = 3
# Letters that fit beside each other below a figure, and what a series' mark takes of them.
_LEGEND_LETTERS, _LEGEND_MARK = 66, 5
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def write_pngs(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Each chart as `folder`/KEY.png; what is not a letter, digit, `_`, `.` or `-` becomes `_`, and a name that is
    taken gets a number."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with plt.rc_context(_STYLE):
        for chart in (chart for group in groups for chart in group.charts):
            path = _free(folder, chart.key, written)
            figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
            _draw(chart, axes)
            figure.savefig(path, dpi=_DPI)
            plt.close(figure)
            written.append(path)
    return written


def _free(folder: Path, key: str, taken: Sequence[Path]) -> Path:
    name = _NO_NAME.sub("_", key).lstrip(".")[:_LONGEST_NAME]
    path, number = folder / f"{name}.png", 1
    while path in taken:
        number += 1
        path = folder / f"{name}-{number}.png"
    return path


def _draw(chart: Chart, axes: Any) -> None:
    match chart:
        case LineChart():
            _lines(chart, axes)
        case Histogram():
            for one in chart.series:
                axes.stairs(one.shares, chart.edges, color=_colour(one.colour), label=_plain(one.name), lw=1.1)
        case Stack():
            _stack(chart, axes)
    if not isinstance(chart, LineChart):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_title(_plain(chart.title), loc="left")
    axes.set_xlabel(_plain(chart.x_label))
    axes.set_ylabel(_plain(chart.unit))
    axes.grid(axis="y", lw=0.4, alpha=0.4)
    if isinstance(chart, LineChart) and chart.span:
        axes.set_xlim(*chart.span)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=_columns(labels))


def _columns(labels: Sequence[str]) -> int:
    """So many as fit the figure's width."""
    return max(1, min(len(labels), _LEGEND_COLUMNS, _LEGEND_LETTERS // (max(map(len, labels)) + _LEGEND_MARK)))


def _lines(chart: LineChart, axes: Any) -> None:
    for line in chart.lines:
        colour, marker = _colour(line.colour), "o" if line.marked else None
        dash = "--" if line.dashed else ("-", "--", ":")[min(line.colour // PALETTE, 2)] if line.colour >= 0 else "-"
        # A dashed line has the colour of a full one, and the title says what it is.
        label = "_" if line.dashed else _plain(line.name.partition(", after")[0])
        bold = line.y if line.smooth is None else line.smooth
        if line.smooth is not None:
            axes.plot(line.x, line.y, color=colour, lw=0.5, alpha=0.3)
        axes.plot(line.x, bold, dash, color=colour, lw=1.1, marker=marker, ms=2.5, label=label)


def _stack(chart: Stack, axes: Any) -> None:
    floor = np.zeros(len(chart.edges) - 1)
    for layer in chart.layers:
        top = floor + layer.shares
        colour = _PHASES[layer.colour % len(_PHASES)]
        axes.stairs(top, chart.edges, baseline=floor, fill=True, color=colour, label=layer.name)
        floor = top
    axes.set_ylim(0, 1)


def _colour(place: int) -> str:
    return _INK if place < 0 else _COLOURS[place % PALETTE]


def _plain(text: str) -> str:
    """No mathematics: a dollar is a dollar."""
    return text.replace("$", r"\$")
