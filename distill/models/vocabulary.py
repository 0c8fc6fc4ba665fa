"""Which ids teacher and student share, which end a response, and which ids lie beyond a model's rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers import PreTrainedConfig as ModelConfig

from distill.errors import BadInput, Problem

RESIZE = "resize the embedding (transformers: resize_token_embeddings) and train the new rows, or leave that token out"


def shared_vocabulary(tokenizer: PreTrainedTokenizerBase, *configs: ModelConfig) -> int:
    """Ids 0 … V−1 that every model has a row for and the tokenizer can write.

    Heads are often padded to a round number, and differently so; the rows past V are cut from both models' logits,
    which renormalises each over what exists.
    """
    return min([len(tokenizer), *map(rows_of, configs)])


def rows_of(config: ModelConfig) -> int:
    """The number of rows of the model's embedding."""
    rows: int = config.get_text_config().vocab_size
    return rows


def eos_ids(
    tokenizer: PreTrainedTokenizerBase, configs: Sequence[ModelConfig | GenerationConfig | None] = ()
) -> list[int]:
    """Ids that end a response: the tokenizer's EOS and those that the models' configurations name."""
    return sorted({index for index in [tokenizer.eos_token_id, *_named_ends(configs)] if index is not None})


@dataclass(frozen=True)
class KnownIds:
    """The ids 0 … `size` − 1: those that a tokenizer writes and each of some models has a row for."""

    size: int
    told: str
    """A phrase for messages: what has the fewest ids, and which these are."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, int]) -> "KnownIds":
        """`rows` of the models' embeddings, each by the name that a message gives its owner."""
        owner = min(rows, key=lambda name: rows[name], default=None)
        if owner is None or len(tokenizer) <= rows[owner]:
            return cls(len(tokenizer), f"the tokenizer has the ids 0 to {len(tokenizer) - 1}")
        return cls(rows[owner], f"the embedding of {owner} has rows for 0 to {rows[owner] - 1}")

    def beyond(self, rows: Iterable[Sequence[int]]) -> int | None:
        """The largest id that is not among these; None: all are."""
        largest = max((max(ids) for ids in rows if len(ids)), default=0)
        return largest if largest >= self.size else None

    def require(self, rows: Iterable[Sequence[int]], field: str, value: str) -> None:
        """Refuse token ids that no row is there for, from `value` of the setting `field`.

        Raises:
            BadInput: names the largest of them.
        """
        if (index := self.beyond(rows)) is not None:
            raise BadInput(Problem(field, value, f"holds the id {index}, {self.told}", RESIZE))


def ends_beyond(
    field: str,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    generation: GenerationConfig | None,
    known: KnownIds,
) -> list[Problem]:
    """List the ends of responses that have no row in the model at `path`: no response could be seen to end there.

    `known` are the ids that it shares with others, and `field` is the setting that names it.
    """
    rows, end, found = rows_of(config), tokenizer.eos_token_id, []
    if isinstance(end, int) and end >= rows:
        wrong = f"its embedding has {rows} rows, EOS {tokenizer.eos_token!r} is id {end}"
        resize = f"resize the embedding (transformers: resize_token_embeddings({len(tokenizer)}))"
        found.append(Problem(field, path, wrong, f"{resize}, or set another eos_token"))
    others = sorted(index for index in set(_named_ends([config, generation])) - {end} if index >= known.size)
    if others:
        wrong = f"its config ends responses at the id {others[-1]}, {known.told}"
        mend = "correct eos_token_id in its config.json and generation_config.json"
        found.append(Problem(field, path, wrong, mend))
    return found


def _named_ends(configs: Sequence[ModelConfig | GenerationConfig | None]) -> list[int]:
    named = [getattr(config, "eos_token_id", None) for config in configs]
    ids = [index for of in named for index in (of if isinstance(of, (list, tuple)) else [of])]
    return [index for index in ids if index is not None]
