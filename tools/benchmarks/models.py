"""A teacher and its third as student: opened from folders, or made with random weights, which cost the same."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distill.config import ModelSettings
from distill.data.batches import TokenBatch
from distill.data.loading import token_batch
from distill.models.loading import load_model
from tools.shrink_model import shrink

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def name_of(dtype: torch.dtype) -> str:
    """A dtype as recipes call it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def open_pair(
    teacher: Path | None, student: Path | None, device: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher. Without a folder the teacher has SmolLM2-135M's shape and random weights; without one the
    student is a third of the teacher's layers."""
    big: Any
    if teacher:
        big = load_model(ModelSettings(path=str(teacher)), dtype)
    else:
        torch.manual_seed(0)
        big = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval()
        big.to(dtype)
    small: Any
    if student:
        small = load_model(ModelSettings(path=str(student)), dtype)
    else:
        small = shrink(copy.deepcopy(big), max(big.config.num_hidden_layers // 3, 2))
    return small.to(device), big.to(device)


def random_prompts(rows: int, longest: int, vocab: int, seed: int = 0) -> TokenBatch:
    """Prompts of random tokens, half as long as the longest up to it."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(longest / 2, longest, rows).round().long().clamp_min(1).tolist()
    texts = [torch.randint(vocab, (length,), generator=g).tolist() for length in lengths]
    return token_batch([{"prompt_ids": text, "response_ids": []} for text in texts])
