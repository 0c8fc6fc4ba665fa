"""Steps at which a run writes a checkpoint."""

from types import SimpleNamespace

import pytest

from distill.checkpoint.catalog import RunState
from distill.trainer import Run


class Saving(Run):
    """As much of a run as decides when to save: every 4 steps, of 10."""

    def __init__(self, step: int, best_step: int | None, told: bool, skipped: int):
        self.state, self.told_to_stop = RunState(step=step, best_step=best_step), told
        self.config = SimpleNamespace(checkpoint=SimpleNamespace(every=4))  # type: ignore[assignment]
        self.bad_steps = SimpleNamespace(in_a_row=skipped)  # type: ignore[assignment]
        self.saves = 0

    @property
    def done(self) -> bool:
        return self.state.step == 10

    def save(self) -> None:
        self.saves += 1


def saves(step: int, best_step: int | None = None, told: bool = False, skipped: int = 0) -> bool:
    run = Saving(step, best_step, told, skipped)
    run.maybe_save()
    return run.saves == 1


@pytest.mark.parametrize(("best_step", "expected"), [(None, [4, 8, 10]), (3, [3, 4, 8, 10]), (8, [4, 8, 10])])
def test_when_it_is_time_when_the_student_is_the_best_and_at_the_end(
    best_step: int | None, expected: list[int]
) -> None:
    assert [step for step in range(1, 11) if saves(step, best_step)] == expected


def test_whenever_it_is_told_to_stop() -> None:
    assert all(saves(step, told=True) for step in range(1, 11))


def test_not_after_a_skipped_step_whose_rollouts_may_be_the_cause() -> None:
    assert [step for step in range(1, 11) if saves(step, 3, told=True, skipped=1)] == [10]
