"""What the teacher has to say of response tokens: its final hidden states, computed once and kept for the loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from distill.data.batches import B, Rollouts, TokenBatch
from distill.engine import Engine
from distill.objectives.chunked import ChunkLogits, HiddenLogits
from distill.topology import Topology

FORWARDS, TOKENS = "sum/teacher_forwards", "sum/teacher_tokens"


class Teacher:
    """Reads batches and answers for them in the loss. `translate` where its tokens are not the student's."""

    def __init__(self, engine: Engine, topology: Topology, translate: Callable[[TokenBatch], TokenBatch] | None = None):
        self.engine, self.topology, self.translate = engine, topology, translate
        self._counts = self._zero()

    def take_counts(self) -> dict[str, Tensor]:
        """This rank's response tokens that came since the last call, recorded, sampled or plain text, in the teacher's
        tokens, and the states computed to predict them: as many, if the teacher reads each token once."""
        counts, self._counts = self._counts, self._zero()
        return counts

    def _zero(self) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=torch.long, device=self.topology.device) for name in (FORWARDS, TOKENS)}

    def read(self, batch: B) -> B:
        """The batch with the teacher's states of its response tokens. Collective."""
        asked = self.translate(batch).to(self.topology.device) if self.translate else batch
        states = self.engine.hidden(asked)
        mask = asked.response_mask
        hidden = states.new_zeros((*batch.response_ids.shape, states.shape[-1]))
        hidden[:, : mask.shape[1]][mask] = states
        self._counts[FORWARDS] += len(states)
        if not isinstance(batch, Rollouts):
            self._counts[TOKENS] += len(states)
        lengths = asked.response_lengths if self.translate else None
        return replace(batch, teacher_hidden=hidden, teacher_lengths=lengths)

    def note_sampled(self, rollouts: Rollouts) -> None:
        """Count fresh rollouts, and what the teacher has read of them while they were sampled."""
        if rollouts.teacher_forwards is not None:
            self._counts[FORWARDS] += rollouts.teacher_forwards.sum()
        lengths = rollouts.response_lengths if rollouts.teacher_lengths is None else rollouts.teacher_lengths
        self._counts[TOKENS] += lengths.sum()

    def known(self, batch: B) -> B:
        """The batch with the teacher's states, read now if nobody has. Collective."""
        return self.read(batch) if batch.teacher_hidden is None else batch

    @contextmanager
    def logits(self, batch: TokenBatch) -> Iterator[ChunkLogits]:
        """The teacher's logits of a known batch's response tokens. Collective."""
        assert batch.teacher_hidden is not None
        hidden = batch.teacher_hidden.to(self.topology.device, non_blocking=True)[batch.response_mask]
        with self.engine.head_gathered():
            yield HiddenLogits(hidden, self.engine.head_logits)
