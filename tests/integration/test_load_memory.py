"""Real ranks: a model is read in shares, and no rank ever has much more than its own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
def test_a_rank_loads_its_share_and_the_largest_weight(launch: Callable, tmp_path: Path) -> None:
    tiny_llama(1000, 1, 0).save_pretrained(tmp_path / "small")
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "large", max_shard_size="100MB")
    launch("tests/ranks/load_memory.py", str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "out.json"))
    for rank in json.loads((tmp_path / "out.json").read_text()):
        assert rank["model"] > 300 * MIB
        # The weight in hand is there as it was read and as it is sent.
        assert rank["peak"] < rank["model"] / 2 + 2 * rank["largest"] + 32 * MIB
