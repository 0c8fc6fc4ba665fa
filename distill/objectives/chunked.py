"""Sums of per-token losses over the vocabulary, a few tokens at a time, with the gradient in closed form.

Whole-vocabulary fp32 temporaries (log-probabilities, probabilities, their products, what autograd keeps of each) are
many times the logits themselves, and the logits are already more than all else a small model holds. Here only one
chunk of either lives at a time, in both directions: the gradient goes on through the lm_head before the next chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.models.heads import Finish
from distill.models.vocab_shard import WHOLE, VocabShard

Evaluate = Callable[[Float[Tensor, "c vocab"], slice, VocabShard], tuple[Float[Tensor, ""], Float[Tensor, "c vocab"]]]
"""From one chunk of logits, its place among the tokens and in the vocabulary: its losses' sum, and their gradient.

It must not keep the logits: the gradient takes their place in memory.
"""

SumOverTokens = Callable[[Evaluate], Float[Tensor, ""]]
"""Σ of a per-token loss of the student over a micro-batch's tokens, differentiable once; 0 for no tokens."""

ChunkLogits = Callable[[slice], Float[Tensor, "c vocab"]]
"""The teacher's logits at some of a micro-batch's tokens, without a gradient."""

# Tokens whose fp32 temporaries live together. On a processor few enough to stay in its cache, …
_CPU_ROWS, _ACCELERATOR_ROWS = 16, 1024
# … and tokens that go through the lm_head together: enough for its matrix products to be worth their set-up.
_HEAD_ROWS = {"cpu": 128}
# Rows of the weight that take part in one product: its scratch space, and the slope's, would be as large as the weight.
# On a processor a product that stays in the cache is added to the slope in half the time of one that does not.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 4096, 16384
# Numbers of a slope that are scaled together: in the cache of a processor, in few launches on an accelerator.
_CPU_SCALED, _ACCELERATOR_SCALED = 2**18, 2**24


# `Evaluate` of a known part of the vocabulary.
_OfChunk = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def _rows(device: torch.device) -> int:
    return _CPU_ROWS if device.type == "cpu" else _ACCELERATOR_ROWS


def chunks(tokens: int, device: torch.device) -> Iterator[slice]:
    """The places of `tokens` tokens, a chunk at a time."""
    rows = _rows(device)
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _head_rows(device: torch.device) -> int:
    return _HEAD_ROWS.get(device.type, _ACCELERATOR_ROWS)


def _blocks(rows: int, device: torch.device) -> list[slice]:
    """The places of `rows` rows of a head's weight, a block at a time."""
    size = _CPU_BLOCK if device.type == "cpu" else _ACCELERATOR_BLOCK
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class HiddenLogits:
    """`ChunkLogits` from hidden states: a block of tokens goes through the lm_head together, the next replaces it."""

    def __init__(self, hidden: Float[Tensor, "n hidden"], head: Callable[[Tensor], Tensor]):
        self._hidden, self._head = hidden, head
        self._block, self._first = hidden[:0], 0

    def __call__(self, tokens: slice) -> Float[Tensor, "c vocab"]:
        """Logits of these tokens; they must lie within one block, as every sum here asks for them."""
        rows = _head_rows(self._hidden.device)
        first = tokens.start // rows * rows
        if not len(self._block) or first != self._first:
            del self._block
            self._block, self._first = self._head(self._hidden[first : first + rows]), first
        return self._block[tokens.start - first : tokens.stop - first]


def sum_over_hidden(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "rows hidden"],
    bias: Float[Tensor, " rows"] | None,
    vocab: int,
    finish: Finish,
    evaluate: Evaluate,
    shard: VocabShard = WHOLE,
) -> Float[Tensor, ""]:
    """The sum from final hidden states through an lm_head, whose first `vocab` rows are real tokens.

    Vocabulary-parallel, the weight is this rank's `shard`: the sum is the whole one, and the gradient of the states
    only what this rank's ids add to it.

    Rows beyond them (a padded vocabulary) take no part: no probability, no gradient. The blocks' products that make up
    the weight's gradient are added up in fp32.
    """
    # Within a Function's forward the gradient is always off; whether one is wanted must be asked here.
    of_chunk: _OfChunk = lambda z, tokens: evaluate(z, tokens, shard)  # noqa: E731
    total: Tensor = _OverHidden.apply(hidden, weight, bias, vocab, finish, of_chunk, torch.is_grad_enabled())
    return total


def _accumulator(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _evaluate_in_rows(products: Tensor, first: int, evaluate: _OfChunk, gradient: Tensor, finish: Finish) -> Tensor:
    """Σ over the head's products, whose first token has place `first`; fills their `gradient`, which may be they."""
    total = products.new_zeros((), dtype=_accumulator(products))
    for part in chunks(len(products), products.device):
        logits = finish.logits(products[part])
        value, slope = evaluate(logits, slice(first + part.start, first + part.stop))
        gradient[part] = finish.pull_back(slope, logits)
        total += value
    return total


class _OverHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vocab: int,
        finish: Finish,
        evaluate: _OfChunk,
        with_gradient: bool,
    ) -> Tensor:
        dtype = _accumulator(hidden)
        total = hidden.new_zeros((), dtype=dtype)
        of_hidden, of_weight, of_bias = (needed and with_gradient for needed in ctx.needs_input_grad[:3])
        blocks = _blocks(vocab, weight.device)
        hidden_slope = torch.empty_like(hidden) if of_hidden else None
        weight_slope = torch.zeros_like(weight, dtype=dtype) if of_weight else None
        bias_slope = torch.zeros_like(bias, dtype=dtype) if bias is not None and of_bias else None
        rows = _head_rows(hidden.device)
        buffer = hidden.new_empty((min(rows, len(hidden)), vocab))
        for start in range(0, len(hidden), rows):
            states = hidden[start : start + rows]
            products = buffer[: len(states)]
            for block in blocks:
                products[:, block] = torch.nn.functional.linear(
                    states, weight[block], None if bias is None else bias[block]
                )
            gradient = products  # row by row it takes their place
            total += _evaluate_in_rows(products, start, evaluate, gradient, finish)
            if hidden_slope is not None:
                parts = (gradient[:, block] @ weight[block] for block in blocks)
                hidden_slope[start : start + rows] = sum(part.to(dtype) for part in parts)
            if weight_slope is not None:
                for block in blocks:
                    weight_slope[block] += gradient[:, block].T @ states
            if bias_slope is not None:
                bias_slope[:vocab] += gradient.sum(0, dtype=dtype)
        # Saved, not kept on ctx: then backward lets them go.
        ctx.save_for_backward(hidden_slope, weight_slope, bias_slope)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = []
        for slope, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            gradients.append(None if slope is None else _scaled(slope, upstream[0], dtype))
        return (*gradients, None, None, None, None)


def _scaled(slope: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """slope · factor in `dtype`, computed in fp32: a factor rounded to bf16 would tilt the whole step."""
    out = torch.empty_like(slope, dtype=dtype)
    # Through one small buffer: a second fp32 copy of the weight's slope would be the largest tensor here.
    together = _CPU_SCALED if slope.device.type == "cpu" else _ACCELERATOR_SCALED
    rows = max(together // max(slope[:1].numel(), 1), 1)
    buffer = torch.empty_like(slope[:rows], dtype=factor.dtype)
    for target, part in zip(out.split(rows), slope.split(rows), strict=True):
        target.copy_(buffer[: len(part)].copy_(part).mul_(factor))
    return out
