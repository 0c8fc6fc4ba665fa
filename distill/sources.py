"""Where an optimizer step's micro-batches come from: recorded responses, or fresh rollouts.

Both are pure functions of (seed, step), so resuming needs nothing but the step and the rollouts in progress.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from distill.config import Config
from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import InstructionRecords, TextRecords
from distill.data.sampler import ShuffledStream
from distill.rollout.worker import RolloutWorker
from distill.telemetry import progress
from distill.topology import Topology

# Axes of the seed, far from epochs and rounds: a mix's coins, and the order of its recorded responses.
_MIX, RECORDED_IN_MIX = 2**31, 2**31 + 1


class Source(Protocol):
    """Gives this rank's micro-batches of an optimizer step; all ranks get equally many."""

    rollouts: Rollouts | None
    """Of the round in progress, for the checkpoint."""

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """Micro-batches of optimizer step `step` (0-based)."""
        ...

    def starts_round(self, step: int) -> bool:
        """Whether step `step` samples new rollouts."""
        ...


class RecordedSource:
    """The data set's own responses."""

    def __init__(self, records: InstructionRecords | TextRecords, config: Config, topology: Topology, axis: int = 0):
        self.records, self.optim, self.topology = records, config.optim, topology
        self.stream = ShuffledStream(len(records), config.run.seed, axis)
        self.rollouts: Rollouts | None = None

    def starts_round(self, step: int) -> bool:
        """Never: nothing is sampled."""
        return False

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """This rank's rows of global batch number `step`."""
        size, topology = self.optim.batch_size, self.topology
        indices = self.stream.take(step * size, size, topology.dp_rank, topology.dp_size)
        return self.records.batch(indices).to(topology.device).split(self.optim.micro_batch)


class MixedSource:
    """Recorded responses or fresh rollouts, step by step by a coin of the seed."""

    def __init__(self, recorded: Source, sampled: Source, share: float, seed: int):
        self.recorded, self.sampled, self.share, self.seed = recorded, sampled, share, seed

    @property
    def rollouts(self) -> Rollouts | None:
        """Of the round in progress."""
        return self.sampled.rollouts

    @rollouts.setter
    def rollouts(self, value: Rollouts | None) -> None:
        self.sampled.rollouts = value

    def _turn(self, step: int) -> tuple[bool, int]:
        """Whether step `step` samples, and how many steps of its kind came before."""
        coins = np.random.default_rng([self.seed, _MIX]).random(step + 1) < self.share
        return bool(coins[step]), int((coins[:step] == coins[step]).sum())

    def starts_round(self, step: int) -> bool:
        """Whether step `step` samples new rollouts."""
        samples, number = self._turn(step)
        return samples and self.sampled.starts_round(number)

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """This rank's rows of optimizer step `step`."""
        samples, number = self._turn(step)
        return (self.sampled if samples else self.recorded).minibatch(number)


class RolloutSource:
    """Rollouts of the current student: `per_round` are sampled, then passed over `inner_epochs` times."""

    def __init__(self, records: InstructionRecords, worker: RolloutWorker, config: Config, topology: Topology):
        self.records, self.worker, self.config, self.topology = records, worker, config, topology
        self.stream = ShuffledStream(len(records), config.run.seed)
        self.batches_per_epoch = config.rollout.per_round // config.optim.batch_size
        self.rollouts: Rollouts | None = None

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps from one sampling to the next."""
        return self.batches_per_epoch * self.config.rollout.inner_epochs

    def starts_round(self, step: int) -> bool:
        """Whether step `step` samples anew."""
        return step % self.steps_per_round == 0

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """This rank's rows of one mini-batch of the current round; samples the round where it starts."""
        round_index, within = divmod(step, self.steps_per_round)
        if within == 0:
            self.rollouts = self._sample(round_index)
        assert self.rollouts is not None, "a run resumed within a round must restore its rollouts"
        epoch, number = divmod(within, self.batches_per_epoch)
        # The prompts came shuffled. A mini-batch is a block of the round's global order, so that any number of ranks
        # makes the same ones; later epochs change the order of the blocks.
        order = np.random.default_rng([self.config.run.seed, round_index, epoch]).permutation(self.batches_per_epoch)
        size = self.config.optim.batch_size // self.topology.dp_size
        start = int(order[number]) * size
        return self.rollouts.rows(slice(start, start + size)).split(self.config.optim.micro_batch)

    def _sample(self, round_index: int) -> Rollouts:
        count, topology = self.config.rollout.per_round, self.topology
        each = self.config.rollout.samples_per_prompt
        row_ids = torch.arange(topology.dp_rank, count, topology.dp_size)
        # Responses to one prompt are neighbours, so that they fall into one mini-batch.
        indices = [self.stream.at((round_index * count + row) // each) for row in row_ids.tolist()]
        with progress(len(indices), f"rollouts of round {round_index + 1}", topology.is_writer) as bar:
            return self.worker.collect(self.records.batch(indices), row_ids, round_index, bar.update)
