"""Attention of a few new tokens over many cached ones, without a copy of the cache.

Where several query heads share a key head, transformers' `sdpa` copies keys and values once for each of them as soon
as there is a mask and more than one new token. Their queries may as well stand under one another, as more rows of the
same head: the same sums, in half the time for the chunks that a model takes which is behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_NAME = "sdpa_grouped"


class _Grouped:
    """An attention function of transformers; remembers the last mask that it stacked, which all layers share."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Hold no mask."""
        self._mask: Tensor | None = None
        self._stacked: Tensor | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch heads new width"],
        key: Float[Tensor, "batch key_heads seen width"],
        value: Float[Tensor, "batch key_heads seen value_width"],
        attention_mask: Float[Tensor, "batch 1 new seen"] | None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch new heads value_width"], None]:
        """As `sdpa`, to which whole sequences are left, and what does not share a mask between heads."""
        batch, heads, new, width = query.shape
        groups, mask = heads // key.shape[1], attention_mask
        grouped = groups > 1 and new < key.shape[2] and kwargs.get("position_bias") is None
        if not grouped or mask is None or mask.shape[1] != 1:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        rows = query.reshape(batch, key.shape[1], groups * new, width)
        out = torch.nn.functional.scaled_dot_product_attention(
            rows, key, value, attn_mask=self._stack(mask, groups), scale=kwargs.get("scaling")
        )
        return out.reshape(batch, heads, new, -1).transpose(1, 2).contiguous(), None

    def _stack(self, mask: Float[Tensor, "batch 1 new seen"], groups: int) -> Float[Tensor, "batch 1 rows seen"]:
        if mask.shape[2] == 1:
            return mask  # one row serves all
        if self._stacked is None or self._mask is not mask or self._stacked.shape[2] != groups * mask.shape[2]:
            self._mask, self._stacked = mask, mask.repeat(1, 1, groups, 1)
        return self._stacked


_grouped = _Grouped()
AttentionInterface.register(_NAME, _grouped)
# Additive: a mask of yes and no would be turned into such a one in every layer.
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def grouped_attention(model: nn.Module) -> Iterator[None]:
    """Let the parts of `model` that attend by `sdpa` do it this way. No dropout within."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    changed: list[Any] = [
        config for config in configs.values() if getattr(config, "_attn_implementation", None) == "sdpa"
    ]
    for config in changed:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        _grouped.forget()
        for config in changed:
            config._attn_implementation = "sdpa"
