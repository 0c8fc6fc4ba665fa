"""DistiLLM's replay buffer, step by step against a loop over the documented random numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from reference import chance

from distill.config import Config
from distill.data.batches import Rollouts, TokenBatch
from distill.objective_settings import DistillmSettings
from distill.replay import ReplaySource
from distill.sources import Source
from distill.topology import Topology

STEPS, SEED, BATCH, MICRO_BATCH = 200, 5, 4, 2


class Counting(Source):
    """Recorded responses: batch n is one row of the token n."""

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        row = torch.tensor([[step]])
        return [TokenBatch(row, torch.tensor([1]), row, torch.tensor([1]))]


class Numbered:
    """Stands where models would sample: batch n holds the token n. Only what a `ReplaySource` asks of a `Sampler`."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.topology = Topology(rank, ranks, 1, torch.device("cpu"), None, None)
        self.worker = self
        self.counts: set[int] = set()

    def sample(self, round_index: int, count: int) -> Rollouts:
        """Responses of unequal widths from batch to batch, a row of each shorter than the others."""
        self.counts.add(count)
        rows, width = count // self.topology.dp_size, 2 + round_index % 3
        lengths = torch.tensor([1] + [width] * (rows - 1))
        mask = torch.arange(width) < lengths[:, None]
        values = torch.full((rows, width), float(round_index)) * mask
        return Rollouts(
            prompt_ids=torch.ones(rows, 2, dtype=torch.long),
            prompt_lengths=torch.full((rows,), 2),
            response_ids=values.long(),
            response_lengths=lengths,
            behavior_logprobs=values,
            teacher_logprobs=values,
            importance_weights=values,
            from_teacher=mask & False,
            ended=torch.ones(rows, dtype=torch.bool),
        )

    def place(self, value: Rollouts) -> Rollouts:
        return value


class Clocked(ReplaySource):
    """Knows which step it is."""

    now = 0

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        self.now = step
        return super().minibatch(step)


def replay(losses: Sequence[float] = (1.0,), ranks: int = 1, **settings: Any) -> tuple[ReplaySource, Numbered]:
    config = Config.model_validate(
        {
            "run": {"folder": "unused", "seed": SEED},
            "student": {"path": "unused"},
            "data": {"train": "unused"},
            "objective": {"name": "distillm"},
            "optim": {"steps": STEPS, "batch_size": BATCH, "micro_batch": MICRO_BATCH},
        }
    )
    sampler, left = Numbered(0, ranks), list(losses)
    source = Clocked(
        Counting(),  # type: ignore[arg-type]
        sampler,  # type: ignore[arg-type]
        lambda: left.pop(0) if len(left) > 1 else left[0],
        lambda: source.now / STEPS,
        DistillmSettings(name="distillm", **settings),
        config,
    )
    return source, sampler


def by_loop(share: float, batches: int) -> Iterator[tuple[bool, int, list[int]]]:
    """Step by step: whether rollouts are taken, which batch of their kind, and the buffer after it."""
    recorded, sampled, buffer = 0, 0, []
    for step in range(STEPS):
        replays, samples, which = chance.replay_draws(SEED, step)
        if replays >= share:
            yield False, recorded, buffer
            recorded += 1
            continue
        if samples < 1 - step / STEPS or not buffer:
            buffer = [*buffer, sampled][-batches:]
            sampled += 1
        yield True, buffer[int(which * len(buffer))], buffer


@pytest.mark.parametrize("resumed_at", [None, 63])
@pytest.mark.parametrize(("replay_rows", "batches"), [(12, 3), (15, 3), (2, 1)])
def test_each_step_takes_what_its_numbers_say(replay_rows: int, batches: int, resumed_at: int | None) -> None:
    """The buffer holds the newest batches, as many as fit and one at least; a checkpoint keeps it."""
    source, sampler = replay(start=0.6, replay=replay_rows)
    used: set[int] = set()
    newest = -1
    for step, (is_sampled, number, buffer) in enumerate(by_loop(0.6, batches)):
        if step == resumed_at:
            saved, memory = source.in_use(), source.memory
            source, sampler = replay(start=0.1, replay=replay_rows)
            source.resume(saved, memory)
        got = source.minibatch(step)
        assert [int(batch.response_ids[0, 0]) for batch in got] == [number] * (2 if is_sampled else 1)
        assert isinstance(got[0], Rollouts) == is_sampled
        if is_sampled:
            assert [len(batch) for batch in got] == [MICRO_BATCH] * 2
            assert torch.equal(got[1].response_ids, torch.full((2, 2 + number % 3), number))
            used.add(number)
        fresh = max(buffer, default=-1) > newest
        newest = max(buffer, default=-1)
        assert (source.fresh is not None) == fresh
    kept = source.in_use()
    assert kept is not None
    assert kept.response_ids[:, 0].tolist() == [n for n in buffer for _ in range(BATCH)]
    assert sampler.counts == {BATCH}
    assert len(used) > 0.6 * newest, "most batches are used at least once"


def test_early_steps_sample_often_and_late_ones_seldom() -> None:
    """0.6 · ¾ of the first 100 steps and 0.6 · ¼ of the others, five standard deviations more or less."""
    buffers = [max(buffer, default=-1) for *_, buffer in by_loop(0.6, 3)]
    early, late = buffers[99] + 1, buffers[199] - buffers[99]
    assert abs(early - 45) < 5 * (100 * 0.45 * 0.55) ** 0.5
    assert abs(late - 15) < 5 * (100 * 0.15 * 0.85) ** 0.5


def test_each_rank_holds_its_rows_of_a_batch() -> None:
    source, sampler = replay(start=1.0, replay=12, ranks=2)
    before: list[int] = []
    for step, (_, number, buffer) in enumerate(by_loop(1.0, 3)):
        if step == 40:
            kept, (source, sampler) = source.in_use(), replay(start=1.0, replay=12, ranks=2)
            assert kept is not None
            assert kept.response_ids[:, 0].tolist() == [n for n in before for _ in range(2)]
            source.resume(kept, {"on_policy": 1.0, "sampled": before[-1] + 1, "recorded": 0})
        (batch,) = source.minibatch(step)
        assert batch.response_ids[:, 0].tolist() == [number] * 2
        before = buffer
    assert sampler.counts == {BATCH}


def test_the_share_rises_only_with_validation_loss() -> None:
    """Rises of 0.05, 0.3 and 0.3 against a tolerance of 0.1, then one that would lead beyond 1."""
    losses = [2.0, 1.5, 1.55, 1.85, 2.15, 1.0, 5.0]
    source, _ = replay(losses, start=0.5, increase=0.2, tolerance=0.1, adapt_every=10)
    shares = [(source.minibatch(step), source.memory["on_policy"])[1] for step in range(70)]
    assert shares[::10] == pytest.approx([0.5, 0.5, 0.5, 0.7, 0.9, 0.9, 1.0])
    assert all(shares[step] == shares[step - step % 10] for step in range(70))


def test_a_validation_loss_of_nan_is_not_held_against_the_next() -> None:
    source, _ = replay([2.0, torch.nan, torch.inf, 2.3], start=0.5, increase=0.2, tolerance=0.1, adapt_every=10)
    shares = [(source.minibatch(step), source.memory["on_policy"])[1] for step in range(40)]
    assert shares[::10] == pytest.approx([0.5, 0.5, 0.5, 0.7])
    assert source.memory["validation_loss"] == 2.3
