"""Attention of a few new tokens over many cached ones, without a copy of the cache.

Where several query heads share a key head, transformers' `sdpa` copies keys and values once for each of them as soon
as there is a mask and more than one new token. Their queries may as well stand under one another, as more rows of the
same head: the same sums, in half the time for chunks such as the teacher's.
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


def _grouped(
    module: nn.Module,
    query: Float[Tensor, "batch heads new width"],
    key: Float[Tensor, "batch key_heads seen width"],
    value: Float[Tensor, "batch key_heads seen value_width"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch new heads value_width"], None]:
    """As `sdpa`; what does not share a mask between heads is left to it."""
    batch, heads, new, width = query.shape
    groups = heads // key.shape[1]
    if groups == 1 or attention_mask is None or attention_mask.shape[1] != 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    stacked = query.reshape(batch, key.shape[1], groups * new, width)
    mask = attention_mask.repeat(1, 1, groups, 1)
    scale = kwargs.get("scaling")
    out = torch.nn.functional.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, new, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _grouped)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


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
        for config in changed:
            config._attn_implementation = "sdpa"
