"""Where an optimizer step's micro-batches come from: recorded responses, fresh rollouts, or both.

Each is a pure function of (seed, step, memory), so resuming needs nothing but these and the rollouts in progress.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from distill.config import Config
from distill.data.batches import B, Rollouts, TokenBatch, concatenate
from distill.data.loading import InstructionRecords, TextRecords
from distill.data.sampler import ShuffledStream
from distill.rollout.worker import RolloutWorker
from distill.teacher import Teacher
from distill.telemetry import progress
from distill.topology import Topology

# Axes of the seed, far from epochs and rounds: a mix's coins, and the order of its recorded responses.
_MIX, RECORDED_IN_MIX = 2**31, 2**31 + 1


class Source(ABC):
    """Gives this rank's micro-batches of an optimizer step; all ranks get equally many."""

    def __init__(self) -> None:
        self.memory: dict[str, float] = {}
        """What it has learnt from the run so far; every rank holds the same, and a checkpoint keeps it."""
        self.fresh: Rollouts | None = None
        """Those sampled for the latest step, if any were."""

    @abstractmethod
    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """Micro-batches of optimizer step `step` (0-based). Collective."""

    def in_use(self) -> Rollouts | None:
        """This rank's rollouts that later steps will need, for the checkpoint."""
        return None

    def resume(self, rollouts: Rollouts | None, memory: dict[str, float]) -> None:
        """Go on where a checkpoint was written, with what it kept of `in_use` and `memory`."""
        self.memory = memory


class RecordedSource(Source):
    """The data set's own responses."""

    def __init__(self, records: InstructionRecords | TextRecords, config: Config, topology: Topology, axis: int = 0):
        super().__init__()
        self.records, self.optim, self.topology = records, config.optim, topology
        self.stream = ShuffledStream(len(records), config.run.seed, axis)

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """This rank's rows of global batch number `step`."""
        size, topology = self.optim.batch_size, self.topology
        indices = self.stream.take(step * size, size, topology.dp_rank, topology.dp_size)
        return self.records.batch(indices).to(topology.device).split(self.optim.micro_batch)


class MixedSource(Source):
    """Recorded responses or fresh rollouts, step by step by a coin of the seed."""

    def __init__(self, recorded: Source, sampled: Source, share: float, seed: int):
        super().__init__()
        self.recorded, self.sampled, self.share, self.seed = recorded, sampled, share, seed

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """This rank's rows of optimizer step `step`."""
        coins = np.random.default_rng([self.seed, _MIX]).random(step + 1) < self.share
        # Its number among the steps of its kind.
        number = int((coins[:step] == coins[step]).sum())
        micro_batches = (self.sampled if coins[step] else self.recorded).minibatch(number)
        self.fresh = self.sampled.fresh if coins[step] else None
        return micro_batches

    def in_use(self) -> Rollouts | None:
        """Of the round in progress."""
        return self.sampled.in_use()

    def resume(self, rollouts: Rollouts | None, memory: dict[str, float]) -> None:
        """Hand the rollouts on to where they came from."""
        self.sampled.resume(rollouts, memory)


class Sampler:
    """Samples the responses to a shuffled stream of prompts, and sees to it that the teacher has read them.

    Ranks among which the teacher is sharded decode together: where the student is not, each of them the rows of all,
    of which it keeps its own.
    """

    def __init__(
        self,
        records: InstructionRecords,
        worker: RolloutWorker,
        teacher: Teacher,
        config: Config,
        topology: Topology,
    ):
        self.records, self.worker, self.teacher = records, worker, teacher
        self.topology, self.micro_batch = topology, config.optim.micro_batch
        self.samples_per_prompt = config.rollout.samples_per_prompt
        self.stream = ShuffledStream(len(records), config.run.seed)

    def prompts(self, round_index: int, count: int, dp_rank: int) -> list[int]:
        """The record of each row of replica `dp_rank` in round `round_index`, which has `count` rows over all ranks.

        Rows of one prompt are neighbours, so that they fall into one mini-batch.
        """
        rows = range(round_index * count + dp_rank, (round_index + 1) * count, self.topology.dp_size)
        return [self.stream.at(row // self.samples_per_prompt) for row in rows]

    def sample(self, round_index: int, count: int) -> Rollouts:
        """Their rollouts. Collective."""
        topology = self.topology
        cohort = self.teacher.cohort if self.worker.teacher else [topology.dp_rank]
        indices = [index for dp_rank in cohort for index in self.prompts(round_index, count, dp_rank)]
        row_ids = torch.cat([torch.arange(dp_rank, count, topology.dp_size) for dp_rank in cohort])
        with progress(len(indices), f"rollouts of round {round_index + 1}", topology.is_writer) as bar:
            kept = row_ids % topology.dp_size == topology.dp_rank
            rollouts = self.worker.collect(self.records.batch(indices), row_ids, round_index, bar.update, kept)
        if rollouts.teacher_hidden is None:
            rollouts = self.read(rollouts)
        self.teacher.note_sampled(rollouts)
        return rollouts

    def read(self, batch: B) -> B:
        """The batch with the teacher's states, each part where it will wait for the loss. Collective.

        Every rank must bring the same number of rows.
        """
        place = self.worker.place
        return place(concatenate([place(self.teacher.read(rows)) for rows in batch.split(self.micro_batch)]))


class RolloutSource(Source):
    """Rollouts of the current student: `per_round` are sampled, then passed over `inner_epochs` times."""

    def __init__(self, sampler: Sampler, config: Config, batch_size: int):
        super().__init__()
        self.sampler, self.config = sampler, config
        self.batch_size = batch_size
        """Rollouts in one step, over all ranks."""
        self.batches_per_epoch = config.rollout.per_round // batch_size
        self._rollouts: Rollouts | None = None

    def place_of(self, step: int) -> tuple[int, slice]:
        """The round that `step` belongs to, and its rows of this rank's share of it.

        The prompts came shuffled. A mini-batch is a block of the round's global order, so that any number of ranks
        makes the same ones; later epochs change the order of the blocks.
        """
        round_index, within = divmod(step, self.batches_per_epoch * self.config.rollout.inner_epochs)
        epoch, number = divmod(within, self.batches_per_epoch)
        order = np.random.default_rng([self.config.run.seed, round_index, epoch]).permutation(self.batches_per_epoch)
        size = self.batch_size // self.sampler.topology.dp_size
        return round_index, slice(int(order[number]) * size, (int(order[number]) + 1) * size)

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """This rank's rows of one mini-batch of the current round; samples the round where it starts."""
        round_index, rows = self.place_of(step)
        starts = step == 0 or self.place_of(step - 1)[0] != round_index
        self.fresh = self.sampler.sample(round_index, self.config.rollout.per_round) if starts else None
        self._rollouts = self.fresh or self._rollouts
        assert self._rollouts is not None, "a run resumed within a round must restore its rollouts"
        return self._rollouts.rows(rows).split(self.config.optim.micro_batch)

    def in_use(self) -> Rollouts | None:
        """The round in progress."""
        return self._rollouts

    def resume(self, rollouts: Rollouts | None, memory: dict[str, float]) -> None:
        """Put the rollouts back where they were."""
        self._rollouts = None if rollouts is None else self.sampler.worker.place(rollouts)


class PairedSource(Source):
    """For each prompt of a step the student's fresh response and the recorded one: half the batch each."""

    def __init__(self, sampler: Sampler, config: Config):
        super().__init__()
        self.sampler, self.config = sampler, config
        self.sampled = RolloutSource(sampler, config, config.optim.batch_size // 2)
        self._recorded: TokenBatch | None = None

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """Rollouts first, then the recorded responses to the same prompts."""
        micro_batches = self.sampled.minibatch(step)
        self.fresh = self.sampled.fresh
        round_index, rows = self.sampled.place_of(step)
        if self._recorded is None or self.fresh is not None:
            self._recorded = self._read(round_index)
            if self.fresh is None:
                self.sampler.teacher.take_counts()  # resumed within a round: it has been counted before
        return [*micro_batches, *self._recorded.rows(rows).split(self.config.optim.micro_batch)]

    def _read(self, round_index: int) -> TokenBatch:
        """The round's recorded responses with the teacher's states: it reads them once, like the rollouts."""
        topology = self.sampler.topology
        indices = self.sampler.prompts(round_index, self.config.rollout.per_round, topology.dp_rank)
        return self.sampler.read(self.sampler.records.batch(indices).to(topology.device))

    def in_use(self) -> Rollouts | None:
        """Of the round in progress."""
        return self.sampled.in_use()

    def resume(self, rollouts: Rollouts | None, memory: dict[str, float]) -> None:
        """Hand the rollouts on; the teacher reads the recorded responses again."""
        self.sampled.resume(rollouts, memory)
