"""Losses over [N, V] logits a few tokens at a time, with the gradient in closed form.

Whole-vocabulary fp32 temporaries (log-probabilities, probabilities, their products, what autograd keeps of each) are
many times the logits themselves. Here only one chunk of them lives at a time; what stays is the gradient, in the
logits' own dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 128
"""Tokens whose fp32 temporaries live together."""

Evaluate = Callable[[Float[Tensor, "c vocab"], slice], tuple[Float[Tensor, ""], Float[Tensor, "c vocab"]]]
"""From one chunk of logits and its place among the tokens: the sum of its losses, and their gradient."""


def sum_over_tokens(logits: Float[Tensor, "n vocab"], evaluate: Evaluate) -> Float[Tensor, ""]:
    """Σ of a per-token loss, differentiable once with respect to `logits`; 0 for no tokens."""
    total: Tensor = _Chunked.apply(logits, evaluate)
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, evaluate: Evaluate) -> Tensor:
        gradient = torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        for start in range(0, len(logits), CHUNK):
            tokens = slice(start, min(start + CHUNK, len(logits)))
            value, gradient[tokens] = evaluate(logits[tokens], tokens)
            total += value
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None
