"""Mixing recorded responses with fresh rollouts: each source sees its own steps in order, whatever resumes where."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.config import RolloutSettings
from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import InstructionRecords
from distill.data.sampler import ShuffledStream
from distill.sources import MixedSource, RolloutSource
from distill.topology import Topology


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


class Asked:
    """Notes what a rollout worker is asked for."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.row_ids: list[int] = []

    def collect(self, prompts: TokenBatch, row_ids: torch.Tensor, round_index: int, progress: object) -> TokenBatch:
        pairs = zip(prompts.prompt_ids.tolist(), prompts.prompt_lengths.tolist(), strict=True)
        self.prompts += [ids[-length:] for ids, length in pairs]
        self.row_ids += row_ids.tolist()
        return prompts


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_prompt_gets_its_samples_on_any_number_of_ranks(records_dir: Path, ranks: int) -> None:
    records = InstructionRecords(records_dir / "train", "data.train")
    rollout = RolloutSettings(per_round=12, samples_per_prompt=3)
    config = SimpleNamespace(
        rollout=rollout, optim=SimpleNamespace(batch_size=4, micro_batch=2), run=SimpleNamespace(seed=5)
    )
    rows: dict[int, tuple[int, ...]] = {}
    for rank in range(ranks):
        topology = Topology(rank, ranks, 1, torch.device("cpu"), None, None)
        worker = Asked()
        RolloutSource(records, worker, config, topology).minibatch(0)
        rows |= dict(zip(worker.row_ids, map(tuple, worker.prompts), strict=True))
    expected = [records.batch([index]).prompt_ids[0].tolist() for index in ShuffledStream(len(records), 5).take(0, 4)]
    assert [list(rows[row]) for row in range(12)] == [prompt for prompt in expected for _ in range(3)]
