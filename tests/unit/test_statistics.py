"""Intervals: against brute force, hand-worked numbers, and how often they hold the truth."""

import numpy as np
import pytest

from distill.evaluation.statistics import Bootstrap, jackknife, mean, ratio

ROWS = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
TOKENS = np.array([2.0, 1.0, 1.0, 4.0, 2.0, 3.0, 2.0, 1.0])


def test_a_ratio_is_of_sums_and_its_interval_that_of_plain_resampling() -> None:
    bootstrap = Bootstrap(len(ROWS), 4000)
    found = bootstrap.of(ratio(ROWS, TOKENS))
    assert found.value == pytest.approx(31 / 16)
    draw = np.random.default_rng(1).integers(0, len(ROWS), (20_000, len(ROWS)))
    plain = np.percentile(ROWS[draw].sum(1) / TOKENS[draw].sum(1), [2.5, 97.5])
    assert [found.low, found.high] == pytest.approx(plain, abs=0.08)
    assert bootstrap.of(mean(ROWS)).value == ROWS.mean()


def test_the_same_rows_give_the_same_interval() -> None:
    assert Bootstrap(8, 200).of(mean(ROWS)) == Bootstrap(8, 200).of(mean(ROWS))


def test_an_interval_holds_the_mean_about_19_times_in_20() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        found = Bootstrap(100, 300).of(mean(generator.exponential(2.0, 100)))
        inside += found.low <= 2.0 <= found.high
    assert 0.90 < inside / 400 < 0.98  # percentile intervals of skewed samples are a little short


def test_a_difference_is_paired() -> None:
    """Rows differ by far more than the models do: only pairs can tell."""
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 10, 200)
    one, other = hard + 0.5 + generator.normal(0, 0.2, 200), hard + generator.normal(0, 0.2, 200)
    bootstrap = Bootstrap(200, 1000)
    found = bootstrap.difference(mean(one), mean(other))
    assert 0.4 < found.low < found.value < found.high < 0.6
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert found.p == 1 / 1000
    assert bootstrap.of(mean(one)).low < bootstrap.of(mean(other)).high, "apart they do not show it"
    assert bootstrap.difference(mean(one), mean(one)).p == 1


def test_p_is_small_as_often_as_it_should_where_models_are_equal() -> None:
    generator = np.random.default_rng(7)
    small = sum(
        Bootstrap(80, 300).difference(mean(generator.normal(size=80)), mean(generator.normal(size=80))).p < 0.1
        for _ in range(300)
    )
    assert 0.06 < small / 300 < 0.15


def test_a_resample_without_tokens_does_not_spoil_the_interval() -> None:
    found = Bootstrap(2, 500).of(ratio(np.array([1.0, 0.0]), np.array([1.0, 0.0])))
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    rows = len(ROWS)
    without = (ROWS.sum() - ROWS) / (rows - 1)
    found = jackknife(ROWS.mean(), without)
    error = ROWS.std(ddof=1) / np.sqrt(rows)
    assert [found.low, found.high] == pytest.approx([ROWS.mean() - 1.96 * error, ROWS.mean() + 1.96 * error])
