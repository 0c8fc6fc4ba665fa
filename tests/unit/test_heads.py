"""Whether what is known of a head gives the model's own logits."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import tiny, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from distill.errors import BadInput
from distill.models.heads import check_head
from distill.topology import Topology


def check(model: PreTrainedModel, vocab: int = 38) -> None:
    alone = Topology(0, 1, 1, torch.device("cpu"), None, None)
    check_head(model, "models/it", vocab, alone, nullcontext())


KNOWN = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "opt": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", KNOWN)
def test_known_families_pass(family: str, dtype: torch.dtype) -> None:
    check(tiny(family, **KNOWN[family]).to(dtype))


UNKNOWN = {
    "hyperclovax": {"logits_scaling": 0.125},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "recurrent_gemma": {"logits_soft_cap": 5.0, "lru_width": 32, "block_types": ["recurrent", "attention"]},
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_unknown_ones_are_refused_by_name(family: str) -> None:
    model = tiny(family, **UNKNOWN[family])
    with pytest.raises(BadInput, match=f"models/it.*{type(model).__name__}"):
        check(model)


class Lying(LlamaForCausalLM):
    """A Llama whose config does not say what its forward does to the logits."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        output = super().forward(*inputs, **named)
        output.logits = self.lie(output.logits)
        return output

    def lie(self, logits: Tensor) -> Tensor:
        return logits


@pytest.mark.parametrize(
    "lie",
    [
        lambda z: 1.1 * z,
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z + 0.1 * torch.arange(12),
        lambda z: z.log_softmax(-1),
    ],
    ids=["scaled", "capped", "offset", "normalised"],
)
def test_a_forward_that_does_more_than_its_config_says_is_refused(lie: Any) -> None:
    # As small as a fresh model's logits come: no cap would show in them.
    model = tiny_llama(12, 1, seed=0, initializer_range=0.02)
    model.__class__ = Lying
    check(model, vocab=12)
    model.lie = lie
    with pytest.raises(BadInput, match="Lying"):
        check(model, vocab=12)


def test_the_check_leaves_no_trace() -> None:
    model = tiny("llama", attention_dropout=0.5)
    before = torch.get_rng_state()
    check(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.base_model._forward_hooks
