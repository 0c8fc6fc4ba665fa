"""Opening models for generation and scoring only, sharded over the ranks by ZeRO-3."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.runtime.zero import parameter_offload
from transformers import PreTrainedTokenizerBase

from distill.config import ModelSettings
from distill.data.records import fingerprint
from distill.deepspeed_settings import resolve_dtype
from distill.engine import Engine
from distill.errors import BadInput, Problem
from distill.models.downloads import opened_at
from distill.models.loading import load_config, load_generation_config, load_tokenizer
from distill.models.vocabulary import KnownIds, ends_beyond, eos_ids, rows_of
from distill.models.weights import check_weights
from distill.topology import Topology

_SHARDED = {"zero_optimization": {"stage": 3}}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a family of models, with the ids they share and those that end a response."""

    tokenizer: PreTrainedTokenizerBase
    known: KnownIds
    eos_ids: list[int]

    @property
    def size(self) -> int:
        """How many ids they share."""
        return self.known.size


def common_vocabulary(models: Sequence[ModelSettings]) -> Vocabulary:
    """What the models share; the first one's tokenizer speaks for all.

    Raises:
        BadInput: an unreadable model, one without whole weights, one of another tokenizer, or whose EOS has no row.
    """
    configs = [load_config(model, "model") for model in models]
    for model in models:
        if (folder := Path(opened_at(model.path))).is_dir():
            check_weights(folder, model, "model")
    tokenizer = load_tokenizer(models[0].path, "model")
    for model in models[1:]:
        if fingerprint(load_tokenizer(model.path, "model")) != fingerprint(tokenizer):
            wrong = f"its tokenizer is not that of {models[0].path!r}"
            raise BadInput(Problem("model", model.path, wrong, "compare models of one tokenizer"))
    generations = list(map(load_generation_config, models))
    known = KnownIds.of(tokenizer, {repr(model.path): rows_of(of) for model, of in zip(models, configs, strict=True)})
    problems: list[Problem] = []
    for model, config, generation in zip(models, configs, generations, strict=True):
        problems += ends_beyond("model", model.path, tokenizer, config, generation, known)
    if problems:
        raise BadInput(problems)
    return Vocabulary(tokenizer, known, eos_ids(tokenizer, [*configs, *generations]))


def load_frozen(
    model: ModelSettings, vocabulary: Vocabulary, topology: Topology, dtype: torch.dtype | None = None
) -> Engine:
    """A model that is only read; by default in what the hardware computes in. Collective."""
    return Engine(model, _SHARDED, dtype or resolve_dtype("auto"), topology, vocabulary.size)


def let_go(engine: Engine) -> None:
    """Its memory is free as soon as nobody else holds the engine: DeepSpeed never forgets a module under ZeRO-3."""
    modules = parameter_offload.FWD_MODULE_STACK
    modules[:] = [module for module in modules if module is not engine.module]
