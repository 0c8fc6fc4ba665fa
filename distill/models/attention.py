"""Attention of a few new tokens over many cached ones, without a copy of the cache.

Where several query heads share a key head, transformers' `sdpa` copies keys and values once for each of them as soon
as there is a mask and more than one new token. Their queries may as well stand under one another, as more rows of the
same head: the same sums. On a processor these are so few that two plain products in fp32 take half the time of its
bf16 kernel, from a cache that is kept in fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_NAME = "sdpa_grouped"
# Scores are written out up to this many (64 MiB in fp32); beyond, a kernel that never holds them all is worth its time.
_MOST_SCORES = 2**24


def _grouped(
    module: nn.Module,
    query: Float[Tensor, "batch heads new width"],
    key: Float[Tensor, "batch key_heads seen width"],
    value: Float[Tensor, "batch key_heads seen value_width"],
    attention_mask: Float[Tensor, "batch 1 new seen"] | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch new heads value_width"], None]:
    """As `sdpa`, to which is left what does not share a mask between heads, and on accelerators whole sequences."""
    batch, heads, new, width = query.shape
    key_heads, seen = key.shape[1:3]
    mask, on_cpu = attention_mask, query.device.type == "cpu"
    small = batch * heads * new * seen <= _MOST_SCORES if on_cpu else heads > key_heads and new < seen
    if not small or mask is None or mask.shape[1] != 1 or kwargs.get("position_bias") is not None:
        key, value = key.to(query.dtype), value.to(query.dtype)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    rows = query.reshape(batch, key_heads, -1, width)
    scale: float = kwargs.get("scaling") or width**-0.5
    if on_cpu:
        out = _in_fp32(rows, key, value, mask, scale)
    else:
        stacked = mask.repeat(1, 1, heads // key_heads, 1)
        out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=stacked, scale=scale)
    return out.to(query.dtype).reshape(batch, heads, new, -1).transpose(1, 2).contiguous(), None


def _in_fp32(
    rows: Float[Tensor, "batch key_heads rows width"],
    key: Float[Tensor, "batch key_heads seen width"],
    value: Float[Tensor, "batch key_heads seen value_width"],
    mask: Float[Tensor, "batch 1 new seen"],
    scale: float,
) -> Float[Tensor, "batch key_heads rows value_width"]:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scores = torch.matmul(rows.to(dtype) * scale, key.to(dtype).transpose(2, 3))
    scores.unflatten(2, (-1, mask.shape[2])).add_(mask[:, :, None])
    return torch.matmul(scores.softmax(-1), value.to(dtype))


AttentionInterface.register(_NAME, _grouped)
# Additive: a mask of yes and no would be turned into such a one in every layer.
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def cache_dtype(config: PretrainedConfig, states: Tensor) -> torch.dtype:
    """What keys and values such as these are kept in, by a model that may attend in this way."""
    in_fp32 = states.device.type == "cpu" and config._attn_implementation == _NAME
    return torch.promote_types(states.dtype, torch.float32) if in_fp32 else states.dtype


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
