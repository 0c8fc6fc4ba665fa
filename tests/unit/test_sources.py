"""Which rows make up which step, on any number of ranks: against the documented order, recomputed from the seed."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import chance
from torch import Tensor

from distill.config import Config
from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import token_batch
from distill.data.sampler import ShuffledStream
from distill.sources import RECORDED_IN_MIX, MixedSource, PairedSource, RecordedSource, RolloutSource, Sampler, Source
from distill.topology import Topology

SIZE, SEED, COPIES, PER_ROUND, EPOCHS, BATCH, MICRO_BATCH = 36, 5, 3, 24, 2, 12, 2


class NumberedRecords:
    """Record n: its prompt ends with n, its response is n a few times."""

    def __len__(self) -> int:
        return SIZE

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        rows = [{"prompt_ids": [1, n][n % 2 :], "response_ids": [n] * (1 + n % 3)} for n in indices]
        return token_batch(rows)


class Echo:
    """Answers each prompt with its record, row and round: what a `Sampler` asks of a worker and of a teacher."""

    def __init__(self, cohort: Sequence[int] = (), reads_while_sampling: bool = False):
        self.cohort, self.reads_while_sampling = cohort, reads_while_sampling
        self.teacher = self if cohort else None
        self.rounds: list[int] = []
        self.taken = 0

    def collect(self, prompts: TokenBatch, row_ids: Tensor, round_index: int, progress: Any, kept: Tensor) -> Rollouts:
        self.rounds.append(round_index)
        progress(len(prompts))
        ids = torch.stack([prompts.prompt_ids[:, -1], row_ids, torch.full_like(row_ids, round_index)], 1)
        scores = torch.zeros(ids.shape)
        rows = Rollouts(
            prompts.prompt_ids,
            prompts.prompt_lengths,
            ids,
            torch.full_like(row_ids, 3),
            behavior_logprobs=scores,
            teacher_logprobs=scores,
            importance_weights=scores,
            from_teacher=scores > 0,
            ended=row_ids > 0,
        )
        rows = rows.rows(kept.nonzero().squeeze(1))
        return self.read(rows) if self.reads_while_sampling else rows

    def place(self, batch: Any) -> Any:
        return batch

    def read(self, batch: Any) -> Any:
        return replace(batch, teacher_hidden=batch.response_ids[..., None].float())

    def note_sampled(self, rollouts: Rollouts) -> None:
        assert rollouts.teacher_hidden is not None

    def take_counts(self) -> dict[str, Tensor]:
        self.taken += 1
        return {}


def config(**rollout: int) -> Config:
    rollout = {"per_round": PER_ROUND, "samples_per_prompt": COPIES, "inner_epochs": EPOCHS} | rollout
    return Config.model_validate(
        {
            "run": {"folder": "unused", "seed": SEED},
            "student": {"path": "unused"},
            "teacher": {"path": "unused"},
            "data": {"train": "unused"},
            "objective": {"name": "distillm2"},
            "rollout": rollout,
            "optim": {"steps": 8, "batch_size": BATCH, "micro_batch": MICRO_BATCH},
        }
    )


def alone(rank: int, ranks: int) -> Topology:
    return Topology(rank, ranks, 1, torch.device("cpu"), None, None)


def sampler(rank: int = 0, ranks: int = 1, echo: Echo | None = None, **rollout: int) -> Sampler:
    echo = echo or Echo()
    return Sampler(NumberedRecords(), echo, echo, config(**rollout), alone(rank, ranks))  # type: ignore[arg-type]


def rows_of(micro_batches: Sequence[TokenBatch]) -> list[list[int]]:
    """The responses, row by row."""
    pairs = [pair for batch in micro_batches for pair in zip(batch.response_ids, batch.response_lengths, strict=True)]
    return [ids[:length].tolist() for ids, length in pairs]


def dealt(parts: Sequence[list[Any]]) -> list[Any]:
    """The global order of what the ranks have: row k is row k // ranks of rank k % ranks."""
    return [row for turn in zip(*parts, strict=True) for row in turn]


def record_of(round_index: int, row: int) -> int:
    return chance.record_at((round_index * PER_ROUND + row) // COPIES, SIZE, SEED)


def test_a_stream_is_a_new_permutation_in_every_epoch_on_every_axis_and_of_every_seed() -> None:
    orders = set()
    for seed, axis, epoch in itertools.product((SEED, 6), (0, RECORDED_IN_MIX), (0, 1, 2)):
        order = ShuffledStream(SIZE, seed, axis).take(SIZE * epoch, SIZE)
        assert order == [chance.record_at(SIZE * epoch + place, SIZE, seed, axis) for place in range(SIZE)]
        assert sorted(order) == list(range(SIZE))
        orders.add(tuple(order))
    assert len(orders) == 12


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_batches_of_an_epoch_hold_every_recorded_response_once(ranks: int) -> None:
    given = [
        RecordedSource(NumberedRecords(), config(), alone(rank, ranks), RECORDED_IN_MIX)  # type: ignore[arg-type]
        for rank in range(ranks)
    ]
    epochs = []
    for epoch in range(2):
        seen: list[list[int]] = []
        for step in range(3 * epoch, 3 * epoch + 3):
            parts = [source.minibatch(step) for source in given]
            assert all(len(batch) == MICRO_BATCH for part in parts for batch in part)
            seen += dealt([rows_of(part) for part in parts])
        numbers = [row[0] for row in seen]
        assert sorted(numbers) == list(range(SIZE))
        assert numbers == [chance.record_at(SIZE * epoch + n, SIZE, SEED, RECORDED_IN_MIX) for n in range(SIZE)]
        assert seen == [[n] * (1 + n % 3) for n in numbers]
        epochs.append(numbers)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_of_a_round_come_once_an_inner_epoch_each_time_in_another_order(ranks: int) -> None:
    source = RolloutSource(sampler(1 % ranks, ranks, inner_epochs=4), config(inner_epochs=4), 4)
    orders = []
    for round_index, epoch in itertools.product((0, 1, 2), range(4)):
        places = [source.place_of((round_index * 4 + epoch) * 6 + number) for number in range(6)]
        assert {found for found, _ in places} == {round_index}
        size = 4 // ranks
        assert all(rows.stop - rows.start == size for _, rows in places)
        orders.append([rows.start // size for _, rows in places])
        assert sorted(orders[-1]) == list(range(6))
        assert orders[-1] == chance.block_order(SEED, round_index, epoch, 6)
    assert len(set(map(tuple, orders))) == 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_step_takes_its_block_of_the_rounds_rows(ranks: int) -> None:
    """Each prompt is sampled as often as asked, in neighbouring rows, whose numbers are those over all ranks."""
    echoes = [Echo() for _ in range(ranks)]
    given = [RolloutSource(sampler(rank, ranks, echo), config(), BATCH) for rank, echo in enumerate(echoes)]
    for step in range(8):
        round_index, within = divmod(step, 4)
        parts = [source.minibatch(step) for source in given]
        assert all(len(batch) == MICRO_BATCH for part in parts for batch in part)
        block = chance.block_order(SEED, round_index, within // 2, 2)[within % 2]
        rows = range(block * BATCH, (block + 1) * BATCH)
        assert dealt([rows_of(part) for part in parts]) == [[record_of(round_index, r), r, round_index] for r in rows]
        assert all((source.fresh is not None) == (within == 0) for source in given)
        hidden = torch.cat([batch.teacher_hidden[..., 0] for batch in parts[0]])
        assert hidden.tolist() == rows_of(parts[0]), "the teacher's states stand beside their rows"
    assert [echo.rounds for echo in echoes] == [[0, 1]] * ranks


def test_ranks_that_share_a_teacher_sample_the_rows_of_all_and_keep_their_own() -> None:
    for rank in (0, 1):
        echo = Echo(cohort=(0, 1), reads_while_sampling=True)
        rows = sampler(rank, 2, echo).sample(1, PER_ROUND)
        assert rows_of([rows]) == [[record_of(1, r), r, 1] for r in range(rank, PER_ROUND, 2)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_recorded_responses_stand_beside_the_rollouts_of_their_prompts(ranks: int) -> None:
    """They do so where a run goes on within a round too: its rollouts come from a checkpoint, and the teacher reads the
    recorded responses again, which counts for nothing."""
    echoes = [Echo() for _ in range(2 * ranks)]
    given = [PairedSource(sampler(rank, ranks, echoes[rank]), config()) for rank in range(ranks)]
    half = BATCH // 2
    for step in range(16):
        if step == 5:
            kept = [source.in_use() for source in given]
            given = [PairedSource(sampler(rank, ranks, echoes[ranks + rank]), config()) for rank in range(ranks)]
            for source, rollouts in zip(given, kept, strict=True):
                source.resume(rollouts, {})
        round_index, within = divmod(step, 8)
        block = chance.block_order(SEED, round_index, within // 4, 4)[within % 4]
        rows = range(block * half, (block + 1) * half)
        records = [record_of(round_index, row) for row in rows]
        parts = [source.minibatch(step) for source in given]
        sampled = [[batch for batch in part if isinstance(batch, Rollouts)] for part in parts]
        recorded = [[batch for batch in part if not isinstance(batch, Rollouts)] for part in parts]
        expected = [[n, row, round_index] for n, row in zip(records, rows, strict=True)]
        assert dealt([rows_of(part) for part in sampled]) == expected
        assert dealt([rows_of(part) for part in recorded]) == [[n] * (1 + n % 3) for n in records]
        assert all(batch.teacher_hidden is not None for part in recorded for batch in part)
        assert all((source.fresh is not None) == (within == 0) for source in given)
    assert [echo.taken for echo in echoes] == [0] * ranks + [1] * ranks


class Counting(Source):
    """A source that notes the steps it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        self.asked.append(step)
        self.fresh = sampler().sample(step, COPIES)
        return []


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_mix_deals_its_steps_by_coins_and_counts_each_kind_apart(share: float) -> None:
    """Step by step, and where it is first asked for a later one."""
    coins = chance.mix_coins(SEED, 200, share)
    # Five standard deviations of a binomial.
    assert abs(sum(coins) - share * 200) < 5 * (share * (1 - share) * 200) ** 0.5
    recorded, sampled = Counting(), Counting()
    mixed = MixedSource(recorded, sampled, share, SEED)
    for step in range(40):
        mixed.minibatch(step)
        assert mixed.fresh is (sampled.fresh if coins[step] else None)
    assert (len(recorded.asked), len(sampled.asked)) == (40 - sum(coins[:40]), sum(coins[:40]))
    assert all(source.asked == list(range(len(source.asked))) for source in (recorded, sampled))
    last = max(step for step, coin in enumerate(coins) if coin)
    MixedSource(recorded, resumed := Counting(), share, SEED).minibatch(last)
    assert resumed.asked == [sum(coins) - 1]
