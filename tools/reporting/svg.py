"""Charts as inline SVG that takes its colours from the page, and so follows light and dark mode."""

import html
from collections.abc import Iterable

import numpy as np

from tools.reporting import ticks
from tools.reporting.charts import Chart, Histogram, Line, LineChart, Numbers, Stack, thin
from tools.reporting.ticks import Axis

PALETTE, PHASES = 7, 6
"""Colours that style.css defines as --c0 …; a series beyond them is dashed, then dotted."""
_WIDTH, _HEIGHT = 340.0, 200.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 8.0, 8.0, 34.0
_X_TICKS, _Y_TICKS = 5, 4


def figure(chart: Chart) -> str:
    """With its caption."""
    about = f"<code>{html.escape(chart.about)}</code>" if chart.about else ""
    unit = f"<span>{html.escape(chart.unit)}</span>" if chart.unit else ""
    caption = f"<figcaption><b>{html.escape(chart.title)}</b>{unit}{about}</figcaption>"
    return f"<figure class=chart>{caption}{draw(chart)}</figure>"


def draw(chart: Chart) -> str:
    """The drawing alone."""
    match chart:
        case LineChart():
            x, y = _axes_of_lines(chart)
            body = "".join(_line(line, x, y) for line in chart.lines)
        case Histogram():
            x, y = _axes_of_histogram(chart)
            body = "".join(
                f'<path class="{css(one.colour)} area" data-series="{html.escape(one.name)}" '
                f'd="{_outline(chart.edges, one.shares, x, y)}"/>'
                for one in chart.series
            )
        case Stack():
            x, y = ticks.fit(*_ends(chart.edges), _X_TICKS, True, whole=True), Axis(0, 1, [0, 0.5, 1])
            body = _stack(chart, x, y)
    label = html.escape(f"{chart.title}, {chart.unit}" if chart.unit else chart.title)
    frame = _frame(x, y, chart.x_label, percent=not isinstance(chart, LineChart))
    scale = f'data-x="{x.low:.6g} {x.high:.6g}" data-y="{y.low:.6g} {y.high:.6g}"'
    if isinstance(chart, LineChart):
        scale += f' data-label="{html.escape(chart.x_label)}"'
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role=img aria-label="{label}" {scale}>{frame}{body}</svg>'


def css(colour: int) -> str:
    """The classes that give a series its colour, and a dash, then dots, where the palette begins anew."""
    if colour < 0:
        return "ink"
    return f"c{colour % PALETTE}{('', ' dash', ' dotted')[min(colour // PALETTE, 2)]}"


def _axes_of_lines(chart: LineChart) -> tuple[Axis, Axis]:
    xs, ys = (np.concatenate([getattr(line, name) for line in chart.lines]) for name in ("x", "y"))
    start, end = chart.span or (float(xs.min()), float(xs.max()))
    low, high = float(ys.min()), float(ys.max())
    if low > 0 and low < 0.35 * high:
        low = 0.0  # near enough to 0 to show it
    return ticks.fit(start, end, _X_TICKS, tight=True, whole=True), ticks.fit(low, high, _Y_TICKS)


def _axes_of_histogram(chart: Histogram) -> tuple[Axis, Axis]:
    top = max(float(one.shares.max()) for one in chart.series)
    whole = bool(chart.edges[1] - chart.edges[0] >= 1)
    return ticks.fit(*_ends(chart.edges), _X_TICKS, True, whole), ticks.fit(0.0, top, _Y_TICKS)


def _ends(edges: Numbers) -> tuple[float, float]:
    return float(edges[0]), float(edges[-1])


def _frame(x: Axis, y: Axis, x_label: str, percent: bool) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y.ticks:
        at = _y(tick, y)
        text = f"{ticks.text(100 * tick)} %" if percent else ticks.text(tick)
        parts.append(f"<path class=grid d='M{_LEFT:g} {at:.1f}H{right:g}'/>")
        parts.append(f"<text class=y x={_LEFT - 6:g} y={at + 3.5:.1f}>{text}</text>")
    for tick in x.ticks:
        parts.append(f"<path class=tick d='M{_x(tick, x):.1f} {bottom:g}v4'/>")
        parts.append(f"<text class=x x={_x(tick, x):.1f} y={bottom + 15:g}>{ticks.text(tick)}</text>")
    parts.append(f"<text class='x label' x={(_LEFT + right) / 2:g} y={_HEIGHT - 4:g}>{html.escape(x_label)}</text>")
    return f"<g class=frame>{''.join(parts)}<path class=base d='M{_LEFT:g} {bottom:g}H{right:g}'/></g>"


def _line(line: Line, x: Axis, y: Axis) -> str:
    classes = css(line.colour) + (" dash" if line.dashed else "")
    series = f'data-series="{html.escape(line.name)}"'
    raw = _points(*thin(line.x, line.y), x, y)
    if line.smooth is None:
        dots = ""
        if line.marked:
            places = (f"M{_x(a, x):.1f} {_y(b, y):.1f}h0" for a, b in zip(line.x, line.y, strict=True))
            dots = f'<path class="{css(line.colour)} dots" {series} d="{"".join(places)}"/>'
        return f'<polyline class="{classes} line" {series} data-read points="{raw}"/>{dots}'
    smooth = _points(*thin(line.x, line.smooth), x, y)
    faint = f'<polyline class="{classes} raw" {series} points="{raw}"/>'
    return f'{faint}<polyline class="{classes} line" {series} data-read points="{smooth}"/>'


def _points(xs: Numbers, ys: Numbers, x: Axis, y: Axis) -> str:
    return " ".join(f"{_x(a, x):.1f},{_y(b, y):.1f}" for a, b in zip(xs, ys, strict=True))


def _outline(edges: Numbers, shares: Numbers, x: Axis, y: Axis) -> str:
    """Along the tops of a histogram's bars, from the ground and back to it."""
    path = [f"M{_x(edges[0], x):.1f} {_y(0, y):.1f}"]
    path += [f"V{_y(b, y):.1f}H{_x(a, x):.1f}" for a, b in zip(edges[1:], shares, strict=True)]
    return "".join(path) + f"V{_y(0, y):.1f}"


def _stack(chart: Stack, x: Axis, y: Axis) -> str:
    parts, floor = [], np.zeros(len(chart.edges) - 1)
    for layer in chart.layers:
        path = _band(chart.edges, floor, floor + layer.shares, x, y)
        parts.append(f'<path class="p{layer.colour % PHASES} fill" d="{path}"/>')
        floor = floor + layer.shares
    return "".join(parts)


def _band(edges: Numbers, low: Numbers, high: Numbers, x: Axis, y: Axis) -> str:
    there: Iterable[str] = (f"V{_y(h, y):.1f}H{_x(e, x):.1f}" for e, h in zip(edges[1:], high, strict=True))
    back = (f"V{_y(b, y):.1f}H{_x(e, x):.1f}" for e, b in zip(edges[-2::-1], low[::-1], strict=True))
    return f"M{_x(edges[0], x):.1f} {_y(low[0], y):.1f}{''.join(there)}{''.join(back)}Z"


def _x(value: float, axis: Axis) -> float:
    return _LEFT + axis.share(float(value)) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, axis: Axis) -> float:
    return _HEIGHT - _BOTTOM - axis.share(float(value)) * (_HEIGHT - _TOP - _BOTTOM)
