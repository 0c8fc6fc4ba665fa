"""Mixing recorded responses with fresh rollouts: each source sees its own steps in order, whatever resumes where."""

from collections.abc import Sequence

import pytest

from distill.data.batches import Rollouts, TokenBatch
from distill.sources import MixedSource


class Counting:
    """A source that notes the steps it is asked for, and starts a round at every second one."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.rollouts: Rollouts | None = None

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        self.asked.append(step)
        return []

    def starts_round(self, step: int) -> bool:
        return step % 2 == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_steps_are_dealt_by_the_share_and_counted_apart(share: float) -> None:
    recorded, sampled = Counting(), Counting()
    mixed = MixedSource(recorded, sampled, share, seed=3)
    steps = 2000
    for step in range(steps):
        mixed.minibatch(step)
    assert recorded.asked == list(range(len(recorded.asked)))
    assert sampled.asked == list(range(len(sampled.asked)))
    # Five standard deviations of a binomial.
    assert abs(len(sampled.asked) - share * steps) < 5 * (share * (1 - share) * steps) ** 0.5


def test_a_resumed_run_deals_the_same_steps() -> None:
    whole, resumed = (MixedSource(Counting(), Counting(), 0.5, seed=1) for _ in range(2))
    for step in range(40):
        whole.minibatch(step)
    for step in range(25, 40):
        resumed.minibatch(step)
    assert whole.sampled.asked[-len(resumed.sampled.asked) :] == resumed.sampled.asked
    assert sum(whole.starts_round(step) for step in range(40)) == (len(whole.sampled.asked) + 1) // 2
