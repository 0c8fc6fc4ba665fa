"""Real models and tokenizers, small enough for a test."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    # GPT-2 with its usual dropout.
    "gpt2": {"n_positions": 64, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "dropout": 0.1},
}


def train_tokenizer(corpus: list[str], size: int, special: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; the first special token is EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0])


def tiny(family: str, seed: int = 0, spread: float = 0.02, **changes: Any) -> PreTrainedModel:
    """A random model of a family that transformers knows, in fp32 and training mode; `spread` is of its weights and
    biases."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_SIZES | _OF_FAMILY.get(family, {}) | changes))
    setattr(config, "init_std" if hasattr(config, "init_std") else "initializer_range", spread)
    model = AutoModelForCausalLM.from_config(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # 0 in a fresh model: what is lost would not be missed
            torch.nn.init.normal_(parameter, std=spread)
    return model


def tiny_llama(vocab: int, layers: int, seed: int, **changes: object) -> LlamaForCausalLM:
    """A random Llama small enough to enumerate; fp32."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
        # Large enough that the next-token distributions are far from uniform.
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
