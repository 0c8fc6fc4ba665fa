"""Models and tokenizers from a Hugging Face folder or hub id."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import PreTrainedConfig as ModelConfig

from distill.config import ModelSettings
from distill.errors import BadInput, Problem
from distill.models.downloads import opened_at


def load_config(settings: ModelSettings, field: str) -> ModelConfig:
    """The model's own configuration, without its weights.

    Raises:
        BadInput: nothing readable at `settings.path`; names the setting `field`.
    """
    try:
        return AutoConfig.from_pretrained(opened_at(settings.path), trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unreadable(settings.path, field, "model", error) from None


def load_generation_config(settings: ModelSettings) -> GenerationConfig | None:
    """What the model says of generating, such as further ids that end a response; None if it says nothing."""
    try:
        return GenerationConfig.from_pretrained(opened_at(settings.path))
    except OSError:
        return None


def load_tokenizer(path: str, field: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer, or a bare sentencepiece `.model` file.

    Raises:
        BadInput: no tokenizer there; names the setting `field`.
    """
    try:
        if path.endswith(".model") and Path(path).is_file():
            return _sentencepiece_tokenizer(path)
        return AutoTokenizer.from_pretrained(opened_at(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(path, field, "tokenizer", error) from None


def load_model(settings: ModelSettings, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model, in evaluation mode, its weights in `dtype`; safetensors only."""
    model = AutoModelForCausalLM.from_pretrained(
        opened_at(settings.path), dtype=dtype, trust_remote_code=settings.trust_remote_code, use_safetensors=True
    )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.eval()


def _sentencepiece_tokenizer(path: str) -> PreTrainedTokenizerBase:
    # Llama's tokenizer class is the thin wrapper around any sentencepiece model with byte fallback or without.
    import sentencepiece
    from transformers import LlamaTokenizer

    model = sentencepiece.SentencePieceProcessor(model_file=path)
    special: dict[str, Any] = {
        name: model.id_to_piece(index)
        for name, index in (("eos_token", model.eos_id()), ("bos_token", model.bos_id()), ("unk_token", model.unk_id()))
        if index >= 0
    }
    return LlamaTokenizer.from_pretrained(path, **special)


def _unreadable(path: str, field: str, what: str, error: Exception) -> BadInput:
    local = Path(path)
    if local.suffix == ".gguf" and local.is_file():
        wrong = "quantised weights, of which every rank would need all"
        mend = "make a folder of it, once: python -m tools.import_gguf"
        return BadInput(Problem(field, path, wrong, mend))
    if local.exists():
        wrong = f"no readable {what} there ({_first_line(error)})"
    elif path.count("/") > 1 or path.startswith((".", "/", "~")):
        wrong = "no such folder"
    else:
        wrong = f"neither a folder here nor a {what} on the hub ({_first_line(error)})"
    return BadInput(Problem(field, path, wrong, "give a Hugging Face model folder or hub id"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
