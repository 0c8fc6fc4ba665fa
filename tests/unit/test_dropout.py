"""Training without dropout: the numbers of evaluation mode, with activations still recomputed."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
)

from distill.models.dropout import train_without_dropout

SIZE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZE | {"intermediate_size": 64}
OF_GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
PDROP = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
HIDDEN = {"hidden_dropout": 0.5, "attention_dropout": 0.5}
CONFIGS = [
    GPT2Config(**OF_GPT, **PDROP),
    GPTJConfig(**OF_GPT, **PDROP, rotary_dim=4),
    OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
    GPTNeoXConfig(**WIDE, **HIDDEN),
    FalconConfig(**SIZE, **HIDDEN),
    BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, **HIDDEN),
    PhiConfig(**WIDE, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
    LlamaConfig(**WIDE, attention_dropout=0.5),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_training_without_dropout(config: PreTrainedConfig, recompute: bool) -> None:
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 50, (2, 9))
    expected = model.eval()(ids, use_cache=False).logits
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    if recompute:
        model.gradient_checkpointing_enable()
    calls: list[str] = []
    first = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    first.register_forward_hook(lambda *_: calls.append("forward"))

    assert not torch.allclose(model.train()(ids, use_cache=False).logits, expected), "its dropout is on"
    train_without_dropout(model)
    calls.clear()
    logits = model(ids, use_cache=False).logits
    assert torch.equal(logits, expected)
    logits.square().mean().backward()
    assert len(calls) == (2 if recompute else 1), "backward computes the layer again where it should"
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(got, gradients, strict=True))

    assert not torch.allclose(model.train()(ids, use_cache=False).logits, expected), "train() brings dropout back"
    assert torch.equal(model.eval()(ids, use_cache=False).logits, expected)
