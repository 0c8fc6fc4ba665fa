"""Intervals and p-values against scipy's on the same numbers, and against loops over plain resamples."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from goodness_of_fit import chi_square, p_value
from numpy import ndarray
from scipy import stats

from distill.evaluation.statistics import Bootstrap, Difference, Estimate, jackknife, mean, ratio

ROWS = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
OTHER = np.array([2.5, 1.5, 3.0, 0.5, 5.5, 6.0, 2.0, 4.0])
TOKENS = np.array([2.0, 1.0, 1.0, 4.0, 2.0, 3.0, 2.0, 1.0])
RESAMPLES = 20_000

Statistic = Callable[..., ndarray]


def resampled_rows(bootstrap: Bootstrap, rows: int) -> ndarray:
    """[resamples, rows]: the numbers of the rows that each of its resamples is made of."""
    given: list[ndarray] = []
    bootstrap.of(lambda weights: given.append(weights) or weights.sum(1))
    whole, drawn = given
    assert whole.tolist() == [[1] * rows]
    return np.array([np.repeat(np.arange(rows), counts.astype(int)) for counts in drawn])


def by_scipy(data: tuple[ndarray, ...], statistic: Statistic, method: str, drawn: ndarray | None = None) -> list[float]:
    """The limits of scipy's 95 % interval, from given values of the resamples or from its own resamples."""
    own = {"n_resamples": RESAMPLES, "rng": np.random.default_rng(1)}
    given = {"n_resamples": 0, "bootstrap_result": SimpleNamespace(bootstrap_distribution=drawn)}
    found = stats.bootstrap(data, statistic, paired=True, method=method, **(own if drawn is None else given))
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def total_over_total(a: ndarray, b: ndarray, axis: int = -1) -> ndarray:
    return a.sum(axis) / b.sum(axis)


def difference_of_ratios(a: ndarray, other: ndarray, b: ndarray, axis: int = -1) -> ndarray:
    return a.sum(axis) / b.sum(axis) - other.sum(axis) / b.sum(axis)


def limits(found: Estimate) -> list[float]:
    return [found.low, found.high]


def test_resamples_are_drawn_with_replacement_each_row_as_often() -> None:
    drawn = resampled_rows(Bootstrap(8, RESAMPLES), 8)
    assert drawn.shape == (RESAMPLES, 8)
    often = np.stack([(drawn == row).sum(1) for row in range(8)], 1)
    for row in range(8):
        counts = [int((often[:, row] == k).sum()) for k in range(5)]
        wanted = [RESAMPLES * stats.binom.pmf(k, 8, 1 / 8) for k in range(5)]
        rest = [RESAMPLES - sum(counts), RESAMPLES - sum(wanted)]
        assert stats.chisquare([*counts, rest[0]], [*wanted, rest[1]]).pvalue > 1e-4
    assert np.corrcoef(often[:, 0], often[:, 1])[0, 1] == pytest.approx(-1 / 7, abs=0.03)


@pytest.mark.parametrize(
    ("data", "statistic", "figure"),
    [
        ((ROWS,), np.mean, mean(ROWS)),
        ((ROWS, TOKENS), total_over_total, ratio(ROWS, TOKENS)),
    ],
)
def test_an_interval_is_scipys_percentile_interval(data: tuple[ndarray, ...], statistic: Statistic, figure) -> None:
    bootstrap = Bootstrap(8, RESAMPLES)
    found = bootstrap.of(figure)
    assert found.value == pytest.approx(float(statistic(*data, axis=-1)))
    index = resampled_rows(bootstrap, 8)
    drawn = np.array([statistic(*(of[rows] for of in data), axis=-1) for rows in index])
    assert limits(found) == pytest.approx(by_scipy(data, statistic, "percentile", drawn))
    assert limits(found) == pytest.approx(by_scipy(data, statistic, "percentile"), abs=0.06)


def test_an_interval_of_what_resampling_makes_larger_is_scipys_basic_interval_above_0() -> None:
    centred = ROWS - 4
    figure, statistic = (lambda weights: np.abs(weights @ centred) / 8), (lambda a, axis=-1: np.abs(a.sum(axis)) / 8)
    bootstrap = Bootstrap(8, RESAMPLES)
    drawn = np.array([statistic(centred[rows]) for rows in resampled_rows(bootstrap, 8)])
    low, high = by_scipy((centred,), statistic, "basic", drawn)
    found = bootstrap.of_biased(figure)
    assert low < 0 < found.value == pytest.approx(1 / 8)
    assert limits(found) == pytest.approx([0, max(high, 0)])
    shifted = ROWS + 4
    drawn = np.array([statistic(shifted[rows]) for rows in resampled_rows(bootstrap, 8)])
    assert limits(bootstrap.of_biased(lambda weights: weights @ shifted / 8)) == pytest.approx(
        by_scipy((shifted,), statistic, "basic", drawn)
    )


def test_a_difference_is_scipys_of_pairs_and_its_p_a_count_of_resamples() -> None:
    bootstrap = Bootstrap(8, RESAMPLES)
    found = bootstrap.difference(ratio(ROWS, TOKENS), ratio(OTHER, TOKENS))
    assert found.value == pytest.approx((31 - 25) / 16)
    drawn, below, above = [], 0, 0
    for rows in resampled_rows(bootstrap, 8):
        value = ROWS[rows].sum() / TOKENS[rows].sum() - OTHER[rows].sum() / TOKENS[rows].sum()
        drawn.append(value)
        below, above = below + (value <= 0), above + (value >= 0)
    data = (ROWS, OTHER, TOKENS)
    assert limits(found) == pytest.approx(by_scipy(data, difference_of_ratios, "percentile", np.array(drawn)))
    assert limits(found) == pytest.approx(by_scipy(data, difference_of_ratios, "percentile"), abs=0.03)
    assert 0 < 2 * below / RESAMPLES < 0.2
    assert found.p == pytest.approx(2 * min(below, above) / RESAMPLES)
    turned = bootstrap.difference(ratio(OTHER, TOKENS), ratio(ROWS, TOKENS))
    assert turned == Difference(-found.value, pytest.approx(-found.high), pytest.approx(-found.low), found.p)


def test_p_is_about_that_of_scipys_test_of_pairs() -> None:
    """Rows differ by far more than the models do, so only pairs can tell; 200 rows, differences of many sizes."""
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 10, 200)
    other = hard + generator.normal(0, 0.2, 200)
    bootstrap = Bootstrap(200, 4000)
    for shift in (-0.05, -0.02, 0.0, 0.01, 0.03):
        one = hard + shift + generator.normal(0, 0.2, 200)
        found = bootstrap.difference(mean(one), mean(other))
        signs = stats.permutation_test(
            (one, other),
            lambda a, b, axis: np.mean(a - b, axis),
            permutation_type="samples",
            n_resamples=4000,
            vectorized=True,
            rng=np.random.default_rng(5),
        )
        assert found.p == pytest.approx(signs.pvalue, abs=0.04)
        assert found.p == pytest.approx(stats.ttest_rel(one, other).pvalue, abs=0.04)
    surely = bootstrap.difference(mean(hard + 0.5 + generator.normal(0, 0.2, 200)), mean(other))
    assert 0.4 < surely.low < surely.value < surely.high < 0.6
    assert surely.p == 1 / 4000, "as small as so many resamples can show"
    assert bootstrap.difference(mean(one), mean(one)).p == 1


def test_a_resample_without_tokens_does_not_spoil_the_interval() -> None:
    found = Bootstrap(2, 500).of(ratio(np.array([1.0, 0.0]), np.array([1.0, 0.0])))
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    without = np.array([np.mean(np.delete(ROWS, row)) for row in range(8)])
    found = jackknife(ROWS.mean(), without)
    error = stats.sem(ROWS)
    assert found.value == ROWS.mean()
    assert limits(found) == pytest.approx([ROWS.mean() - 1.96 * error, ROWS.mean() + 1.96 * error])


def test_the_goodness_of_fit_that_sampling_is_tested_with_is_scipys() -> None:
    generator = np.random.default_rng(0)
    for cells in (2, 3, 7, 40):
        expected = generator.dirichlet(np.ones(cells)) * 1000 + 1
        observed = generator.multinomial(round(expected.sum()), expected / expected.sum()) + generator.integers(0, 9)
        expected *= observed.sum() / expected.sum()
        found = chi_square(observed.tolist(), expected.tolist())
        assert found == pytest.approx(stats.chisquare(observed, expected).pvalue, abs=1e-12)
    # Of 100 draws c and d are expected 4 and 3 times: they are one cell.
    probabilities = {(1,): 0.5, (2,): 0.43, (3,): 0.04, (4,): 0.03}
    seen = [(1,)] * 40 + [(2,)] * 50 + [(3,)] * 9 + [(4,)]
    assert p_value(seen, probabilities) == pytest.approx(stats.chisquare([40, 50, 10], [50, 43, 7]).pvalue)
    with pytest.raises(AssertionError, match="probability 0"):
        p_value([*seen, (5,)], probabilities)
