"""A loss summed over logits that are there already, as training sums it over those it makes of hidden states."""

from typing import Any

import torch
from torch import Tensor

from distill.models.heads import Finish
from distill.models.vocab_shard import WHOLE, VocabShard
from distill.objectives.chunked import Evaluate, SumOverTokens, _evaluate_in_rows


def over(logits: Tensor) -> SumOverTokens:
    """The student's side of a loss, from whole logits."""
    return lambda evaluate: sum_over_logits(logits, evaluate)


def sum_over_logits(logits: Tensor, evaluate: Evaluate, shard: VocabShard = WHOLE) -> Tensor:
    """The sum of [N, V] logits, which are this rank's `shard` of the vocabulary."""
    total: Tensor = _OverLogits.apply(logits, lambda z, tokens: evaluate(z, tokens, shard))
    return total


class _OverLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, evaluate: Any) -> Tensor:
        gradient = torch.empty_like(logits)
        total = _evaluate_in_rows(logits, 0, evaluate, gradient, Finish())
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0]).to(gradient.dtype), None
