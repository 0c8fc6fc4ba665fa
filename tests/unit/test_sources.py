"""Mixing recorded responses with rollouts: each source sees its own steps in order, whatever resumes where."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import Config
from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import InstructionRecords
from distill.data.sampler import ShuffledStream
from distill.objective_settings import DistillmSettings
from distill.replay import ReplaySource
from distill.sources import MixedSource, Sampler, Source
from distill.topology import Topology


class Counting(Source):
    """A source that notes the steps it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        self.asked.append(step)
        return []


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


def test_a_resumed_mix_deals_the_same_steps() -> None:
    whole, resumed = (MixedSource(Counting(), Counting(), 0.5, seed=1) for _ in range(2))
    for step in range(40):
        whole.minibatch(step)
    for step in range(25, 40):
        resumed.minibatch(step)
    assert whole.sampled.asked[-len(resumed.sampled.asked) :] == resumed.sampled.asked


def rollouts(number: int, rows: int = 4) -> Rollouts:
    """Responses that tell which batch they are of, a row of them shorter than the others."""
    width = 2 + number % 3
    per_token = torch.full((rows, width), float(number))
    lengths = torch.tensor([1] + [width] * (rows - 1))
    mask = torch.arange(width) < lengths[:, None]
    return Rollouts(
        prompt_ids=torch.ones(rows, 2, dtype=torch.long),
        prompt_lengths=torch.full((rows,), 2),
        response_ids=torch.full((rows, width), number) * mask,
        response_lengths=lengths,
        behavior_logprobs=per_token * mask,
        teacher_logprobs=per_token * mask,
        importance_weights=per_token * mask,
        from_teacher=torch.zeros(rows, width, dtype=torch.bool),
        ended=torch.ones(rows, dtype=torch.bool),
    )


class Numbered:
    """Stands where models would sample: batch n holds the token n. Only what a `ReplaySource` asks of a `Sampler`."""

    def __init__(self) -> None:
        self.topology = Topology(0, 1, 1, torch.device("cpu"), None, None)
        self.worker = self
        self.sampled: list[int] = []

    def sample(self, round_index: int, count: int) -> Rollouts:
        self.sampled.append(round_index)
        return rollouts(round_index, count)

    def place(self, value: Rollouts) -> Rollouts:
        return value


STEPS = 400


def settings_of(**rollout: int) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": "unused", "seed": 5},
            "student": {"path": "unused"},
            "data": {"train": "unused"},
            "objective": {"name": "distillm"},
            "rollout": rollout,
            "optim": {"steps": STEPS, "batch_size": 4, "micro_batch": 2},
        }
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_prompt_gets_its_samples_on_any_number_of_ranks(records_dir: Path, ranks: int) -> None:
    records = InstructionRecords(records_dir / "train", "data.train")
    for round_index in (0, 1):
        rows: dict[int, int] = {}
        for rank in range(ranks):
            topology = Topology(rank, ranks, 1, torch.device("cpu"), None, None)
            sampler = Sampler(records, Numbered(), None, settings_of(samples_per_prompt=3), topology)  # type: ignore[arg-type]
            rows |= dict(zip(range(rank, 12, ranks), sampler.prompts(round_index, 12, rank), strict=True))
        expected = ShuffledStream(len(records), 5).take(4 * round_index, 4)
        assert [rows[row] for row in range(12)] == [record for record in expected for _ in range(3)]


class Clocked(ReplaySource):
    """Knows which step it is."""

    now = 0

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        self.now = step
        return super().minibatch(step)


def replay(losses: Sequence[float] = (1.0,), **settings: Any) -> tuple[ReplaySource, Counting, Numbered]:
    config = settings_of()
    recorded, sampler, left = Counting(), Numbered(), list(losses)
    source = Clocked(
        recorded,  # type: ignore[arg-type]
        sampler,  # type: ignore[arg-type]
        lambda: left.pop(0) if len(left) > 1 else left[0],
        lambda: source.now / STEPS,
        DistillmSettings(name="distillm", **settings),
        config,
    )
    return source, recorded, sampler


def test_replay_takes_its_share_and_samples_ever_less() -> None:
    source, recorded, sampler = replay(start=0.6, replay=40)
    fresh = [bool((source.minibatch(step), source.fresh)[1]) for step in range(STEPS)]
    assert recorded.asked == list(range(len(recorded.asked)))
    assert sampler.sampled == list(range(len(sampler.sampled)))
    assert abs(len(recorded.asked) - 0.4 * STEPS) < 5 * (0.24 * STEPS) ** 0.5
    early, late = sum(fresh[: STEPS // 2]), sum(fresh[STEPS // 2 :])
    # 0.6 · ¾ and 0.6 · ¼ of 200 steps, five standard deviations at most apart from them.
    assert abs(early - 90) < 5 * (200 * 0.45 * 0.55) ** 0.5
    assert abs(late - 30) < 5 * (200 * 0.15 * 0.85) ** 0.5


def test_the_buffer_holds_the_newest_and_all_of_them_are_used() -> None:
    source, _, sampler = replay(start=1.0, replay=12)
    used: set[int] = set()
    for step in range(STEPS):
        micro_batches = source.minibatch(step)
        number = int(micro_batches[0].response_ids[0, 0])
        assert [len(rows) for rows in micro_batches] == [2, 2]
        assert max(sampler.sampled) - 3 < number <= max(sampler.sampled)
        used.add(number)
    assert len(used) > 0.6 * len(sampler.sampled)
    kept = source.in_use()
    assert kept is not None
    assert kept.response_ids[:, 0].tolist() == [n for n in sampler.sampled[-3:] for _ in range(4)]


def test_the_share_rises_only_with_validation_loss() -> None:
    """Rises of 0.05, 0.3 and 0.3 against a tolerance of 0.1, then one that would lead beyond 1."""
    losses = [2.0, 1.5, 1.55, 1.85, 2.15, 1.0, 5.0]
    source, _, _ = replay(losses, start=0.5, increase=0.2, tolerance=0.1, adapt_every=10)
    shares = [(source.minibatch(step), source.memory["on_policy"])[1] for step in range(70)]
    assert shares[::10] == pytest.approx([0.5, 0.5, 0.5, 0.7, 0.9, 0.9, 1.0])
    assert all(shares[step] == shares[step - step % 10] for step in range(70))


def test_a_validation_loss_of_nan_is_not_held_against_the_next() -> None:
    source, _, _ = replay([2.0, torch.nan, torch.inf, 2.3], start=0.5, increase=0.2, tolerance=0.1, adapt_every=10)
    shares = [(source.minibatch(step), source.memory["on_policy"])[1] for step in range(40)]
    assert shares[::10] == pytest.approx([0.5, 0.5, 0.5, 0.7])
    assert source.memory["validation_loss"] == 2.3


def test_a_resumed_replay_gives_the_same_batches() -> None:
    losses = [1.0, 1.5, 2.0, 2.5, 3.0]
    whole, _, _ = replay(losses, start=0.5, adapt_every=20, replay=20)
    batches = [whole.minibatch(step) for step in range(30)]
    saved, memory = whole.in_use(), whole.memory
    batches = [whole.minibatch(step) for step in range(30, 100)]
    again, recorded, _ = replay(losses[2:], start=0.5, adapt_every=20, replay=20)
    again.resume(saved, memory)
    for step, expected in zip(range(30, 100), batches, strict=True):
        got = again.minibatch(step)
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours.response_ids, theirs.response_ids)
    assert again.memory == whole.memory
    assert recorded.asked[0] == memory["recorded"]
