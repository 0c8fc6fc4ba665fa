"""What an objective gives back, and what it must offer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from distill.data.batches import TokenBatch
from distill.objectives.chunked import ChunkLogits, SumOverTokens

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks."""


@dataclass(frozen=True)
class LossTerms:
    """Sums over the tokens of one micro-batch; only the engine divides, by the token count of the whole step."""

    total: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    """Detached sums over the same tokens, each to be divided by the same count."""


class Objective(ABC):
    """A loss on micro-batches. Its tokens are the real response tokens only, in row order."""

    def __init__(self) -> None:
        self.memory: dict[str, float] = {}
        """What it has learnt from the run so far; every rank holds the same, and a checkpoint keeps it."""

    def prepare(self, micro_batches: Sequence[TokenBatch], reduce: Reduce) -> Sequence[TokenBatch]:
        """What must be known of the whole optimizer step before its first micro-batch; most need nothing."""
        return micro_batches

    @abstractmethod
    def loss(self, student: SumOverTokens, teacher: ChunkLogits | None, batch: TokenBatch) -> LossTerms:
        """Sum of the per-token losses of one micro-batch; `student` is called once, with a closed form of them."""

    def advance(self, figures: Mapping[str, float], progress: float) -> dict[str, float]:
        """The memory after a finished step, of this record; `progress` is the share of the run's steps that is done."""
        return self.memory
