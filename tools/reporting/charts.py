"""Figures as data, drawn as SVG for the page (`svg.py`) and as PNG for papers (`png.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Numbers = Float[ndarray, " n"]

WINDOW = 0.05
"""Records that a mean reaches over, as a share of a run's."""
FEWEST_TO_SMOOTH = 40
_MARKED = 24
_BUCKETS = 200
"""Of a thinned line; each keeps two points."""


@dataclass(frozen=True)
class Line:
    """One series. Where `smooth` is given, `y` is drawn faint behind it."""

    name: str
    colour: int
    """Place in the palette; -1: the ink of the page."""
    x: Numbers
    y: Numbers
    smooth: Numbers | None = None
    dashed: bool = False

    @property
    def marked(self) -> bool:
        """So few points that each is worth a dot."""
        return len(self.x) <= _MARKED


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis."""

    key: str
    """Unique; becomes a PNG's name."""
    title: str
    unit: str
    x_label: str
    lines: Sequence[Line]
    about: str = ""
    """A word more, as that of a metric's key."""
    span: tuple[float, float] | None = None
    """Ends of the x axis; without it those of the lines."""


@dataclass(frozen=True)
class Bars:
    """One distribution: the share of values in each bin, and how many values there are."""

    name: str
    colour: int
    shares: Numbers
    count: int
    mean: float


@dataclass(frozen=True)
class Histogram:
    """Distributions over common bins; `edges` are one more than `shares`."""

    key: str
    title: str
    unit: str
    x_label: str
    edges: Numbers
    series: Sequence[Bars]
    about: str = ""


@dataclass(frozen=True)
class Layer:
    """One part of a stack: its share in each column, in [0, 1]."""

    name: str
    colour: int
    shares: Numbers


@dataclass(frozen=True)
class Stack:
    """Shares of a whole by step; `edges` are one more than a layer's columns."""

    key: str
    title: str
    unit: str
    x_label: str
    edges: Numbers
    layers: Sequence[Layer]
    about: str = ""


Chart = LineChart | Histogram | Stack


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    name: str
    title: str
    charts: Sequence[Chart] = field(default_factory=tuple)
    is_open: bool = True


def window(count: int) -> int:
    """Records that the bold line's mean reaches over, an odd number; 1: none, the points speak for themselves."""
    return 1 if count < FEWEST_TO_SMOOTH else 2 * max(1, int(WINDOW * count / 2)) + 1


def running_mean(values: Numbers, width: int) -> Numbers:
    """Centred, so that nothing lags; near the ends over as many values as lie on both sides alike."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(np.minimum(place, place[::-1]), width // 2)
    return np.asarray((total[place + reach + 1] - total[place - reach]) / (2 * reach + 1))


def thin(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """At most `2 · _BUCKETS` points: of each bucket of neighbours the lowest and the highest, so that no peak is lost,
    and the two ends."""
    if len(x) <= 2 * _BUCKETS:
        return x, y
    kept = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), _BUCKETS - 1):
        kept |= {int(bucket[y[bucket].argmin()]), int(bucket[y[bucket].argmax()])}
    places = sorted(kept)
    return x[places], y[places]


def bins(values: Sequence[Numbers], at_most: int = 30, whole: bool = False) -> Numbers:
    """Edges of equal bins that hold all `values`; with `whole` numbers each bin holds as many of them."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if whole:
        width = max(1, -(-int(high - low + 1) // at_most))
        return np.arange(low, high + width + 0.5, width) - 0.5
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, at_most + 1)


def bars(name: str, colour: int, values: Numbers, edges: Numbers) -> Bars:
    """The distribution of `values`."""
    counts = np.histogram(values, edges)[0]
    return Bars(name, colour, counts / len(values), len(values), float(values.mean()))
