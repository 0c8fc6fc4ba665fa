"""HTML made of Python values; every text that is not markup goes through `esc`."""

import html
from collections.abc import Iterable

from tools.reporting import svg, ticks
from tools.reporting.evaluations import Estimate

NONE = "–"
_HUGE = 1e6


def esc(value: object) -> str:
    """As text, quotes too."""
    return html.escape(str(value))


def number(value: float, decimals: int, signed: bool = False) -> str:
    """With a true minus sign; a huge one in short, a dash for what is no number."""
    if value != value:
        return NONE
    if abs(value) >= _HUGE:
        return ticks.text(value)
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text.replace("-", "−")


def table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Of cells that are markup already; a `<td …>` or `<th …>` stays as it is. Wide ones scroll by themselves."""
    head = "".join(_cell(cell, "th") for cell in header)
    body = "".join(f"<tr>{''.join(_cell(cell, 'td') for cell in row)}</tr>" for row in rows)
    return f'<div class=wide><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str, tag: str) -> str:
    return content if content.startswith(("<td", "<th")) else f"<{tag}>{content}</{tag}>"


def tag(name: str, colour: int) -> str:
    """A run's or model's name with its colour."""
    return f'<span class=name><i class="dot {svg.css(colour)}"></i>{esc(name)}</span>'


def whisker(figure: Estimate, low: float, high: float, colour: int, zero: bool = False) -> str:
    """A dot on its interval, on a scale from `low` to `high`; with a mark at 0 if asked."""
    span = high - low or 1.0

    def at(value: float) -> str:
        return f"{min(max(100 * (value - low) / span, 0), 100):.1f}%"

    if not all(value == value for value in (figure.value, figure.low, figure.high)):
        return ""
    line = f"left:{at(figure.low)};right:calc(100% - {at(figure.high)})"
    origin = f'<u style="left:{at(0)}"></u>' if zero else ""
    drawn = f'<i style="{line}"></i><b style="left:{at(figure.value)}"></b>'
    return f'<span class="whisker {svg.css(colour)}">{origin}{drawn}</span>'


def folded(summary: str, content: str, is_open: bool = False, kind: str = "") -> str:
    """Content behind a line of markup."""
    return f'<details class="{kind}"{" open" if is_open else ""}><summary>{summary}</summary>{content}</details>'
