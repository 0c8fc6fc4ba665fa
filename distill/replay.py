"""DistiLLM's adaptive off-policy data (arXiv 2402.03898): recorded responses, and ever more of the student's."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from distill.config import Config
from distill.data.batches import Rollouts, TokenBatch, concatenate
from distill.objective_settings import DistillmSettings
from distill.sources import RecordedSource, Sampler, Source

# An axis of the seed, far from epochs and rounds.
_REPLAY = 2**31 + 2


class ReplaySource(Source):
    """With probability `memory["on_policy"]` a step takes a batch of the replay buffer, else recorded responses.

    A replay step samples a new batch into the buffer first, with a probability that falls from 1 to 0 as the run goes:
    the older the student, the more it learns from what it has written before. The probability of replay rises whenever
    validation loss has, by more than the tolerance, between two looks at it.
    """

    def __init__(
        self,
        recorded: RecordedSource,
        sampler: Sampler,
        validation_loss: Callable[[], float],
        progress: Callable[[], float],
        settings: DistillmSettings,
        config: Config,
    ):
        super().__init__()
        self.recorded, self.sampler = recorded, sampler
        self.validation_loss, self.progress = validation_loss, progress
        self.settings, self.config = settings, config
        self.size = config.optim.batch_size // sampler.topology.dp_size
        """This rank's rows of a batch."""
        self.capacity = max(settings.replay // config.optim.batch_size, 1)
        """Batches in the buffer."""
        self.memory = {"on_policy": settings.start, "sampled": 0, "recorded": 0}
        self._buffer: list[Rollouts] = []

    def minibatch(self, step: int) -> Sequence[TokenBatch]:
        """This rank's rows of optimizer step `step`. Collective where it looks at validation loss."""
        if step % self.settings.adapt_every == 0:
            self._adapt()
        config, self.fresh = self.config, None
        replays, samples, which = np.random.default_rng([config.run.seed, _REPLAY, step]).random(3)
        if replays >= self.memory["on_policy"]:
            return self.recorded.minibatch(self._next("recorded"))
        if samples < 1 - self.progress() or not self._buffer:
            self.fresh = self.sampler.sample(self._next("sampled"), config.optim.batch_size)
            self._buffer = [*self._buffer, self.fresh][-self.capacity :]
        return self._buffer[int(which * len(self._buffer))].split(config.optim.micro_batch)

    def _next(self, kind: str) -> int:
        number = self.memory[kind]
        self.memory = self.memory | {kind: number + 1}
        return int(number)

    def _adapt(self) -> None:
        s, loss = self.settings, self.validation_loss()
        if not math.isfinite(loss):
            return  # no loss can be held against it
        share = self.memory["on_policy"]
        if loss > self.memory.get("validation_loss", loss) + s.tolerance:
            share = min(share + s.increase, 1.0)
        self.memory = self.memory | {"on_policy": share, "validation_loss": loss}

    def in_use(self) -> Rollouts | None:
        """The buffer's batches, one after the other."""
        return concatenate([batch.to("cpu") for batch in self._buffer]) if self._buffer else None

    def resume(self, rollouts: Rollouts | None, memory: dict[str, float]) -> None:
        """Take the buffer apart again."""
        super().resume(rollouts, memory)
        # Cut on the host: a cut on the device would hold on to the whole until its last batch leaves.
        cuts = rollouts.split(self.size) if rollouts is not None else []
        self._buffer = [self.sampler.worker.place(batch.clone()) for batch in cuts]
