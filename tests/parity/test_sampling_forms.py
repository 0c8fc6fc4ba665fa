"""A model in its form for sampling, weights packed and key heads shared, says what it says as it is."""

import copy

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.attention import _grouped, grouped_attention
from distill.models.heads import hidden_states, project
from distill.models.packing import PackedLinear, packed
from distill.rollout.cache import preallocated_cache


@torch.no_grad()
def in_three_chunks(model: PreTrainedModel) -> Tensor:
    """Logits of left-padded prompts, a chunk and a single token over the cache."""
    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = preallocated_cache(model.config, ids.shape[1])
    parts = [
        hidden_states(model, ids[:, a:b], mask[:, :b], positions[:, a:b], cache) for a, b in ((0, 6), (6, 11), (11, 12))
    ]
    return project(model, torch.cat(parts, 1), 50).float()[mask.bool()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_forms_do_not_change_the_logits(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, seed=2, spread=0.1, vocab_size=50).to(dtype).eval()
    exact = in_three_chunks(copy.deepcopy(model).float())
    before = model.config._attn_implementation
    with packed(model), grouped_attention(model):
        formed = in_three_chunks(model)
    assert model.config._attn_implementation == before
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    if dtype == torch.float32:
        torch.testing.assert_close(formed, exact, rtol=1e-5, atol=1e-5)
    else:  # rounded elsewhere, but no more
        plain = in_three_chunks(model)
        assert (formed - exact).norm() < 1.1 * (plain - exact).norm()


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 kernels on this processor")
def test_packed_copies_follow_the_weights_and_go() -> None:
    layer = nn.Sequential(nn.Linear(32, 48).bfloat16())
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            layer[0].weight.mul_(2)
            expected = layer(x)
            with packed(layer):
                assert type(layer[0]) is PackedLinear
                torch.testing.assert_close(layer(x), expected)
            assert type(layer[0]) is nn.Linear
            assert "packed" not in vars(layer[0])


@pytest.mark.parametrize("shape", [(2, 9, 3, 5, 7), (1, 4, 4, 3, 3), (2, 6, 1, 1, 9)], ids=str)
def test_grouped_attention_equals_a_loop_over_heads(shape: tuple[int, ...]) -> None:
    batch, heads, key_heads, new, seen = shape
    query, key, value = (
        torch.randn(batch, h, n, 8, dtype=torch.float64)
        for h, n in ((heads, new), (key_heads, seen), (key_heads, seen))
    )
    module = nn.Module()
    module.num_key_value_groups = heads // key_heads
    for _ in range(2):  # the second mask is not taken for the first, which is remembered
        mask = torch.rand(batch, 1, new, seen) < 0.7
        mask[..., 0] = True
        additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
        got, _ = _grouped(module, query, key, value, additive, scaling=0.3)
        for head in range(heads):
            shared = head // (heads // key_heads)
            scores = query[:, head] @ key[:, shared].transpose(1, 2) * 0.3
            expected = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ value[:, shared]
            torch.testing.assert_close(got[:, :, head], expected)
