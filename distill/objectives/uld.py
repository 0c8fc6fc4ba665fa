"""Universal logit distillation: for a teacher whose tokens are not the student's (arXiv 2402.12030)."""

import torch
from torch import Tensor

from distill.data.batches import Rollouts, TokenBatch
from distill.models.vocab_shard import VocabShard
from distill.objective_settings import UldSettings
from distill.objectives.chunked import ChunkLogits, SumOverTokens
from distill.objectives.closed_forms import ValueAndGradient, sorted_distance
from distill.objectives.terms import LossTerms, Objective
from distill.objectives.word_level import sum_of_pair


class Uld(Objective):
    """Σ_t (1 − c)·Σ_i |p_(i) − q_(i)| + c·CE, probabilities sorted in descending order.

    The t-th tokens of both models' readings of a response stand against each other, as far as both reach; cross-entropy
    takes all of the student's.
    """

    def __init__(self, settings: UldSettings):
        super().__init__()
        self.settings = settings

    def loss(self, student: SumOverTokens, teacher: ChunkLogits | None, batch: TokenBatch) -> LossTerms:
        """The sum over one micro-batch. A rollout has no ground truth, so c is 0 there."""
        assert batch.teacher_lengths is not None
        columns = torch.arange(batch.response_ids.shape[1], device=batch.response_ids.device)
        reached = (columns < batch.teacher_lengths[:, None])[batch.response_mask]

        def distance(z_q: Tensor, z_p: Tensor, tokens: slice, shard: VocabShard) -> ValueAndGradient:
            value, gradient = sorted_distance(z_q.log_softmax(-1), z_p.log_softmax(-1), shard)
            both = reached[tokens]
            return value * both, gradient.mul_(both[:, None])

        hard = 0.0 if isinstance(batch, Rollouts) else self.settings.ce_weight
        return sum_of_pair(distance, "uld", student, teacher, batch, 1 - hard, hard)
