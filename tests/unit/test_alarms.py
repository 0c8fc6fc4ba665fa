"""Alarms of figures that are finite: they warn of leaps, shrinking and repetition, and of little else."""

import json

import numpy as np
import pytest

from distill.alarms import Alarm, look
from distill.config import FaultSettings

SETTINGS = FaultSettings()


def warnings(rows: list[dict[str, float]], settings: FaultSettings = SETTINGS) -> list[tuple[int, Alarm]]:
    """The steps, from 1, at which a run of these figures warns."""
    memory: dict[str, float] = {}
    found = []
    for step, figures in enumerate(rows, 1):
        alarms, memory = look(figures, memory, settings, step)
        found += [(step, alarm) for alarm in alarms]
    return found


def steps_of(rows: list[dict[str, float]], settings: FaultSettings = SETTINGS) -> list[int]:
    return [step for step, _ in warnings(rows, settings)]


def falling(steps: int, noise: float, seed: int = 0) -> np.ndarray:
    """A loss as of a run that goes well."""
    draws = np.random.default_rng(seed).normal(size=steps)
    return (1 + 3 * np.exp(-np.arange(steps) / 80)) * (1 + noise * draws)


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.05, 0.2])
def test_a_run_that_goes_well_is_left_alone(noise: float) -> None:
    for seed in range(20):
        assert steps_of([{"loss/total": float(value)} for value in falling(500, noise, seed)]) == []


def test_a_leap_is_told_with_its_bound() -> None:
    losses = falling(120, 0.05)
    losses[90] *= 4
    ((step, alarm),) = warnings([{"loss/total": float(value)} for value in losses])
    assert step == 91
    assert alarm.title == "Loss spike"
    assert alarm.text.startswith(f"loss/total leapt to {losses[90]:.4g}: its running mean is ")
    told = float(alarm.text.split("running mean is ")[1].split(",")[0])
    assert losses[40:90].min() < told < losses[40:90].max(), "the mean before the leap"


@pytest.mark.parametrize(("at", "warned"), [(5, False), (19, False), (20, True)])
def test_the_first_steps_tell_nothing(at: int, warned: bool) -> None:
    losses = np.ones(30)
    losses[at] = 10
    assert steps_of([{"loss/total": float(value)} for value in losses]) == ([at + 1] if warned else [])


@pytest.mark.parametrize(("to", "warned"), [(1.2, False), (1.3, True)])
def test_a_smooth_loss_may_bend_by_a_quarter(to: float, warned: bool) -> None:
    """Its deviation is 0, of which any bend is many times as much."""
    assert steps_of([{"loss/total": 1.0}] * 40 + [{"loss/total": to}]) == ([41] if warned else [])


def test_one_leap_does_not_hide_the_next() -> None:
    losses = falling(300, 0.05)
    losses[[100, 200]] *= 4
    assert steps_of([{"loss/total": float(value)} for value in losses]) == [101, 201]


def test_a_loss_that_stays_high_is_told_once_and_becomes_usual() -> None:
    losses = falling(600, 0.05)
    losses[100:] += 8
    told = steps_of([{"loss/total": float(value)} for value in losses])
    assert told[0] == 101
    assert len(told) <= 2, "within the silence the bound has come to where the loss is"


def test_a_policy_gradient_is_judged_by_its_divergence() -> None:
    """Its loss leaps about 0, which means nothing."""
    draws = np.random.default_rng(1).standard_cauchy(400)
    rows = [{"loss/total": float(draw), "student/reverse_kl": 1.0} for draw in draws]
    assert steps_of(rows) == []
    rows[300]["student/reverse_kl"] = 3.0
    assert steps_of(rows) == [301]


def test_sampled_and_recorded_steps_have_losses_of_their_own() -> None:
    rows = [
        {"loss/total": 1.0} if step % 2 else {"loss/total": 9.0, "rollout/response_length": 20.0} for step in range(200)
    ]
    assert steps_of(rows) == []
    rows[151]["loss/total"] = 5.0
    assert steps_of(rows) == [152]


def rounds(lengths: list[float], eos_rate: float = 1.0, distinct: float = 0.95) -> list[dict[str, float]]:
    """A round every fourth step."""
    rows: list[dict[str, float]] = []
    for length in lengths:
        figures = {"loss/total": 1.0, "rollout/response_length": length, "rollout/eos_rate": eos_rate}
        rows += [figures | {"rollout/distinct_4": distinct}, figures, figures, figures]
    return rows


def test_responses_that_shrink() -> None:
    ((step, alarm),) = warnings(rounds([40.0, 44.0, 36.0, 30.0, 20.0, 12.0, 9.0, 8.0]))
    assert step == 25
    assert alarm == Alarm(
        "Length collapse",
        "responses have 9.0 tokens on average: 40.0 in the first rounds, the bound is 0.25 of that (fault.min_length)",
    )


def test_a_student_that_learns_to_stop_is_no_collapse() -> None:
    """Until its responses end by themselves their length is that of the limit."""
    rows = rounds([256.0] * 5, eos_rate=0.1) + rounds([60.0, 50.0, 40.0, 35.0, 30.0])
    assert steps_of(rows) == []
    assert steps_of(rows + rounds([10.0])) == [41]


def test_responses_that_repeat_themselves_are_told_again_after_a_while() -> None:
    told = warnings(rounds([40.0] * 30, distinct=0.3))
    assert [step for step, _ in told] == [1, 53, 105]
    assert told[0][1].title == "Repetitive responses"
    assert "only 0.30 are distinct: the bound is 0.5 (fault.min_distinct)" in told[0][1].text


def test_each_can_be_switched_off() -> None:
    rows = rounds([40.0] * 10 + [1.0] * 10, distinct=0.0)
    for row in rows[60:]:
        row["loss/total"] = 50.0
    assert len(steps_of(rows)) >= 3
    assert steps_of(rows, FaultSettings(loss_spike=0, min_length=0, min_distinct=0)) == []


def test_a_resumed_run_warns_alike() -> None:
    rows = rounds([40.0] * 12 + [4.0] * 12, distinct=0.4)
    for row in rows[70:74]:
        row["loss/total"] = 30.0
    memory: dict[str, float] = {}
    resumed = []
    for step, figures in enumerate(rows, 1):
        alarms, memory = look(figures, memory, SETTINGS, step)
        memory = json.loads(json.dumps(memory))  # as a checkpoint keeps it
        resumed += [(step, alarm) for alarm in alarms]
    assert resumed == warnings(rows)
