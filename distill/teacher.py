"""What the teacher has to say of response tokens: its final hidden states, computed once and kept for the loss.

The ranks among which one teacher is sharded must read the same rows. Where the student is sharded alike they have the
same. Where it is not, each has rows of its own: the teacher then reads the rows of all of them, and each takes its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from distill.data.batches import B, Rollouts, TokenBatch, concatenate
from distill.engine import Engine
from distill.models.vocab_shard import WHOLE, VocabShard
from distill.objectives.chunked import ChunkLogits, HiddenLogits
from distill.topology import Topology

FORWARDS, TOKENS = "sum/teacher_forwards", "sum/teacher_tokens"


class Teacher:
    """Reads batches and answers for them in the loss. `translate` where its tokens are not the student's.

    `grid` is the teacher's own: ranks that share a teacher are one replica of it.
    """

    def __init__(
        self,
        engine: Engine,
        topology: Topology,
        grid: Topology,
        translate: Callable[[TokenBatch], TokenBatch] | None = None,
        shard: VocabShard = WHOLE,
    ):
        self.shard = shard
        """The ids that the student's logits are of."""
        self.engine, self.topology, self.grid, self.translate = engine, topology, grid, translate
        self.cohort = [topology.dp_rank]
        """The student's replicas whose rows one teacher reads together, this rank's among them."""
        if grid.tp_size > topology.tp_size:
            self.cohort = [grid.dp_rank * grid.tp_size + place for place in range(grid.tp_size)]
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
        states = self._hidden(asked)
        mask = asked.response_mask
        hidden = states.new_zeros((*batch.response_ids.shape, states.shape[-1]))
        hidden[:, : mask.shape[1]][mask] = states
        self._counts[FORWARDS] += len(states)
        if not isinstance(batch, Rollouts):
            self._counts[TOKENS] += len(states)
        lengths = asked.response_lengths if self.translate else None
        return replace(batch, teacher_hidden=hidden, teacher_lengths=lengths)

    def _hidden(self, batch: TokenBatch) -> Tensor:
        """States of this rank's tokens. Every rank must bring the same number of rows."""
        if len(self.cohort) == 1:
            return self.engine.hidden(batch)
        mine = TokenBatch(batch.prompt_ids, batch.prompt_lengths, batch.response_ids, batch.response_lengths).to("cpu")
        parts = self.grid.gather_in_replica(mine)
        tokens = [int(part.response_lengths.sum()) for part in parts]
        states = self.engine.hidden(concatenate(parts).to(self.topology.device))
        return states.split(tokens)[self.grid.rank_in_replica].clone()  # lets go of the others'

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
        """The teacher's logits of a known batch's response tokens, over the ids that the student's have. Collective."""
        assert batch.teacher_hidden is not None
        hidden = batch.teacher_hidden.to(self.topology.device, non_blocking=True)[batch.response_mask]
        with self.engine.head_over(self.shard) as head:
            yield HiddenLogits(hidden, head)
