"""Opening models for generation and scoring only, sharded over the ranks by ZeRO-3."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from distill.config import ModelSettings
from distill.data.records import fingerprint
from distill.deepspeed_settings import resolve_dtype
from distill.engine import Engine
from distill.errors import BadInput, Problem
from distill.models.loading import load_config, load_generation_config, load_tokenizer
from distill.models.vocabulary import eos_ids, shared_vocabulary
from distill.topology import Topology

_SHARDED = {"zero_optimization": {"stage": 3}}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a family of models, with the ids they share and those that end a response."""

    tokenizer: PreTrainedTokenizerBase
    size: int
    eos_ids: list[int]


def common_vocabulary(paths: Sequence[str]) -> Vocabulary:
    """What the models at `paths` share; the first one's tokenizer speaks for all.

    Raises:
        BadInput: an unreadable model, or one of another tokenizer.
    """
    models = [ModelSettings(path=path) for path in paths]
    configs = [load_config(model, "model") for model in models]
    tokenizer = load_tokenizer(paths[0], "model")
    for path in paths[1:]:
        if fingerprint(load_tokenizer(path, "model")) != fingerprint(tokenizer):
            wrong = f"its tokenizer is not that of {paths[0]!r}"
            raise BadInput(Problem("model", path, wrong, "compare models of one tokenizer"))
    ends = eos_ids(tokenizer, [*configs, *map(load_generation_config, models)])
    return Vocabulary(tokenizer, shared_vocabulary(tokenizer, *configs), ends)


def load_frozen(path: str, vocabulary: Vocabulary, topology: Topology) -> Engine:
    """A model that is only read. Collective."""
    return Engine(ModelSettings(path=path), _SHARDED, resolve_dtype("auto"), topology, vocabulary.size)
