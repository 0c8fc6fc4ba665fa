"""Intervals and significance by resampling rows: what other prompts of the same kind might have given."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

_LOW, _HIGH = 2.5, 97.5

Figure = Callable[[Float[ndarray, "k rows"]], Float[ndarray, " k"]]
"""A figure of weighted rows, for k sets of weights at once."""


@dataclass(frozen=True)
class Estimate:
    """A figure with the limits of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """Of two models on the same rows."""

    p: float
    """Two-sided: how often a resample has the other sign, doubled; at least 1 / resamples."""


class Bootstrap:
    """Resamples of N rows with replacement, the same ones for every figure and every model, so that pairs stay pairs.

    Percentile intervals (Efron & Tibshirani 1993, ch. 13).
    """

    def __init__(self, rows: int, resamples: int, seed: int = 0):
        generator = np.random.default_rng([seed, rows])
        self._counts: Float[ndarray, "resamples rows"] = generator.multinomial(
            rows, np.full(rows, 1 / rows), size=resamples
        ).astype(np.float64)

    def of(self, figure: Figure) -> Estimate:
        """A figure with its interval."""
        value, drawn = self._both(figure)
        low, high = np.percentile(drawn, [_LOW, _HIGH])
        return Estimate(value, float(low), float(high))

    def of_biased(self, figure: Figure) -> Estimate:
        """A figure that is never negative and that resampling makes larger, such as a sum of absolute values: the
        basic interval (Davison & Hinkley 1997, section 5.2) turns the percentile one round and so takes that out."""
        found = self.of(figure)
        low, high = (max(2 * found.value - limit, 0.0) for limit in (found.high, found.low))
        return Estimate(found.value, low, high)

    def difference(self, one: Figure, other: Figure) -> Difference:
        """A figure of one model minus that of another."""
        value, drawn = self._both(lambda counts: one(counts) - other(counts))
        low, high = np.percentile(drawn, [_LOW, _HIGH])
        p = 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())
        return Difference(value, float(low), float(high), float(min(max(p, 1 / len(drawn)), 1)))

    def _both(self, figure: Figure) -> tuple[float, ndarray]:
        # A resample may have no token at all to divide by: then it says nothing.
        with np.errstate(invalid="ignore", divide="ignore"):
            value, drawn = float(figure(np.ones((1, self._counts.shape[1])))[0]), figure(self._counts)
        drawn = drawn[~np.isnan(drawn)]
        assert len(drawn), "what is not a number is refused where it arises"
        return value, drawn


def ratio(a: Float[ndarray, " rows"], b: Float[ndarray, " rows"]) -> Figure:
    """Σa / Σb over rows: a mean per token, where b counts tokens."""
    return lambda weights: np.asarray((weights @ a) / (weights @ b))


def mean(a: Float[ndarray, " rows"]) -> Figure:
    """Over rows."""
    return ratio(a, np.ones_like(a, dtype=np.float64))


def jackknife(value: float, without: Float[ndarray, " rows"]) -> Estimate:
    """A figure from its values without each of N rows, ±1.96 standard errors.

    For what counts distinct things: a resample holds rows twice, and so always fewer distinct ones.
    """
    rows = len(without)
    error = float(np.sqrt((rows - 1) / rows * ((without - without.mean()) ** 2).sum()))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error)
