"""Rewards, reward-to-go and whitening: by hand, and whitening on two ranks against the statistics of both."""

import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest
import torch
from torch import Tensor

from distill.objectives.returns import reward_to_go, token_rewards, whiten

RANKS = [
    [[[1.5, -2.0, 0.25], [4.0]], [[-0.5, 3.0]]],
    [[[0.75]], [[2.5, -1.25, 6.0, -3.0], [0.5, 1.0]]],
]
"""Returns by rank, micro-batch and row: six tokens on the first rank, seven on the second."""


class SumOfTwo:
    """Adds up what two threads bring; both get the sum."""

    def __init__(self) -> None:
        self.barrier, self.brought = threading.Barrier(2), [torch.empty(0)] * 2

    def __call__(self, rank: int, value: Tensor) -> Tensor:
        self.brought[rank] = value
        self.barrier.wait(10)
        total = self.brought[0] + self.brought[1]
        self.barrier.wait(10)
        return total


def padded(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """The rows side by side, and which numbers of them are real."""
    width = max(map(len, rows))
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)
    return values, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


def pools(over: str) -> list[list[float]]:
    """The numbers whose mean and variance whiten micro-batch 0 and micro-batch 1."""
    if over == "tokens":
        everything = [value for rank in RANKS for batch in rank for row in batch for value in row]
        return [everything, everything]
    found = []
    for number in range(2):
        rows = [(row, max(map(len, rank[number]))) for rank in RANKS for row in rank[number]]
        found.append([value for row, width in rows for value in [*row, *[0.0] * (width - len(row))]])
    return found


@pytest.mark.parametrize("over", ["tokens", "padded_micro_batch"])
def test_two_ranks_whiten_by_the_statistics_of_both(over: Literal["tokens", "padded_micro_batch"]) -> None:
    both = SumOfTwo()

    def rank(index: int) -> list[Tensor]:
        values, masks = zip(*map(padded, RANKS[index]), strict=True)
        return whiten(values, masks, over, lambda value: both(index, value))

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(rank, range(2)))
    for given, got in zip(RANKS, found, strict=True):
        for batch, whitened, pool in zip(given, got, pools(over), strict=True):
            mean, deviation = statistics.fmean(pool), (statistics.pvariance(pool) + 1e-8) ** 0.5
            for row, values in zip(batch, whitened.tolist(), strict=True):
                wanted = [(value - mean) / deviation for value in row]
                assert values == pytest.approx([*wanted, *[0.0] * (len(values) - len(row))], abs=1e-12)


def test_without_whitening_the_returns_stay() -> None:
    values, masks = zip(*map(padded, RANKS[0]), strict=True)
    assert all(a is b for a, b in zip(whiten(values, masks, "none", lambda value: value * 2), values, strict=True))


def test_reward_to_go_worked_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    current = reward_to_go(rewards, mask, 0.5, "current", True)
    assert current.tolist() == [[(1 + 1 + 1) / 3, (2 + 2) / 2, 4.0, 0.0]]
    following = reward_to_go(rewards, mask, 0.5, "next", True)
    assert following.tolist() == [[(1 + 1) / 2, 2.0, 0.0, 0.0]]
    assert reward_to_go(rewards, mask, 1.0, "next", False).tolist() == [[6.0, 4.0, 0.0, 0.0]]


def test_rewards_are_scaled_then_clipped() -> None:
    teacher, behavior = torch.tensor([[-1.0, -9.0]]), torch.tensor([[-2.0, -1.0]])
    assert token_rewards(teacher, behavior, 0.5, 3.0).tolist() == [[2.0, -3.0]]
    assert token_rewards(teacher, behavior, 2.0, None).tolist() == [[0.5, -4.0]]
