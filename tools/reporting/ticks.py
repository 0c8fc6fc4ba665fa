"""Round numbers along an axis, and how they are written."""

import math
from typing import NamedTuple

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_WHOLE_STEPS = (1.0, 2.0, 5.0, 10.0)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_THOUSAND, _TINY = 1e4, 1e-3


class Axis(NamedTuple):
    """From `low` to `high`, with marks at `ticks` between."""

    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """Where `value` lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def fit(low: float, high: float, about: int, tight: bool = False, whole: bool = False) -> Axis:
    """An axis that holds `low` to `high` with `about` marks, at `whole` numbers only if asked; it ends at a mark, or
    with `tight` at the values."""
    if not high > low:  # one value: in the middle, or at the foot if it is 0
        low, high = min(0.0, 2 * low), max(0.0, 2 * low) or 1.0
        tight = False
    raw = max((high - low) / about, 1.0 if whole else 0.0)
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (_WHOLE_STEPS if whole else _STEPS) if size * factor >= raw * 0.999)
    first, last = (math.ceil, math.floor) if tight else (math.floor, math.ceil)
    places = range(first(low / step - 1e-9 * (1 if tight else -1)), last(high / step + 1e-9 * (1 if tight else -1)) + 1)
    ticks = [place * step for place in places]
    return Axis(low, high, ticks) if tight else Axis(ticks[0], ticks[-1], ticks)


def text(value: float) -> str:
    """A mark's number: short, with a true minus sign."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    size = abs(value)
    if size < _TINY:
        digits, _, exponent = f"{value:.3g}".partition("e")
        if not exponent:
            digits, _, exponent = f"{value:.2e}".partition("e")
        head = f"{float(digits):g}"
        return f"{head}·10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")
    if size >= _THOUSAND:
        for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= scale:
                return f"{value / scale:.4g}{letter}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")
