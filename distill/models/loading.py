"""Models and tokenizers from a Hugging Face folder or hub id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from transformers.utils import GENERATION_CONFIG_NAME

from distill.config import ModelSettings
from distill.errors import BadInput, Problem
from distill.models.downloads import opened_at

_MOST_LAYERS = 10_000
T = TypeVar("T")


def load_config(settings: ModelSettings, field: str) -> ModelConfig:
    """The model's own configuration, without its weights.

    Raises:
        BadInput: nothing readable at `settings.path`; names the setting `field`.
    """
    where, trusted = opened_at(settings.path), settings.trust_remote_code
    return _read(lambda: AutoConfig.from_pretrained(where, trust_remote_code=trusted), settings.path, field, "model")


def load_generation_config(settings: ModelSettings, field: str = "model") -> GenerationConfig | None:
    """What the model says of generating, such as further ids that end a response; None if it says nothing.

    Raises:
        BadInput: it says it in a file that cannot be read; names the setting `field`.
    """
    where = opened_at(settings.path)
    if Path(where).is_dir() and not (Path(where) / GENERATION_CONFIG_NAME).is_file():
        return None
    if not Path(where).is_dir():  # of the hub: which may have none
        try:
            return GenerationConfig.from_pretrained(where)
        except OSError:
            return None
    return _read(lambda: GenerationConfig.from_pretrained(where), settings.path, field, GENERATION_CONFIG_NAME)


def load_tokenizer(path: str, field: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer, or a bare sentencepiece `.model` file.

    Raises:
        BadInput: no tokenizer there; names the setting `field`.
    """
    if path.endswith(".model") and Path(path).is_file():
        return _read(lambda: _sentencepiece_tokenizer(path), path, field, "tokenizer")
    where = opened_at(path)
    return _read(
        lambda: _probed(AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)),
        path,
        field,
        "tokenizer",
    )


def _probed(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same; some damaged ones open and then fail at the first text."""
    tokenizer.decode(tokenizer.encode("a probe"))
    return tokenizer


def build_on_meta(model_config: ModelConfig, path: str, field: str) -> PreTrainedModel:
    """The causal language model of that configuration, of transformers' own code and without weights.

    Raises:
        BadInput: there is none; names the setting `field`.
    """

    def build() -> PreTrainedModel:
        layers = getattr(model_config.get_text_config(), "num_hidden_layers", None) or 0
        if layers > _MOST_LAYERS:
            raise ValueError(f"{layers} layers")  # it would take forever
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)

    with torch.device("meta"):
        return _read(build, path, field, "causal language model")


def load_model(settings: ModelSettings, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """The causal language model, in evaluation mode, its weights in `dtype`; of safetensors, unless pickles are
    allowed."""
    model = AutoModelForCausalLM.from_pretrained(
        opened_at(settings.path),
        dtype=dtype,
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=None if settings.allow_pickle else True,
        weights_only=True,
    )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.eval()


def _read(read: Callable[[], T], path: str, field: str, what: str) -> T:
    """What `read` gives.

    Raises:
        BadInput: it fails. Of a damaged file transformers lets any error through, so any counts as the file's.
    """
    try:
        return read()
    except Exception as error:
        raise _unreadable(path, field, what, error) from None


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
    return LlamaTokenizer.from_pretrained(path, trust_remote_code=False, **special)


def _unreadable(path: str, field: str, what: str, error: Exception) -> BadInput:
    local = Path(path)
    if local.suffix == ".gguf" and local.is_file():
        wrong = "quantised weights, of which every rank would need all"
        mend = "make a folder of it, once: python -m tools.import_gguf"
        return BadInput(Problem(field, path, wrong, mend))
    if "trust_remote_code" in str(error):
        mend = "give another: here such code is never run"
        if field.endswith(".path"):
            mend = f"read it, then give {field.removesuffix('path')}trust_remote_code=true"
        return BadInput(Problem(field, path, "its code comes with it and would be run", mend))
    if local.exists():
        wrong = f"no readable {what} there ({_first_line(error)})"
    elif path.count("/") > 1 or path.startswith((".", "/", "~")):
        wrong = "no such folder"
    else:
        wrong = f"neither a folder here nor a {what} on the hub ({_first_line(error)})"
    return BadInput(Problem(field, path, wrong, "give a Hugging Face model folder or hub id"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
