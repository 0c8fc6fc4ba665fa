"""What ends a response: an id, or a text that its tokens spell."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from distill.config import RolloutSettings


class Ends(Protocol):
    """Decides after every token. Only tensor work, so that an accelerator is not waited for."""

    def __call__(self, tokens: Int[Tensor, "batch so_far"], rows: Int[Tensor, " alive"]) -> Bool[Tensor, " alive"]:
        """Whether the newest of the response tokens ends each of these rows."""
        ...


class EndIds:
    """Ends at any of some ids."""

    def __init__(self, ids: Sequence[int], device: torch.device | str = "cpu"):
        self.ids = torch.tensor(sorted(set(ids)), dtype=torch.long, device=device)

    def __call__(self, tokens: Int[Tensor, "batch so_far"], rows: Int[Tensor, " alive"]) -> Bool[Tensor, " alive"]:
        """Whether the newest token is one of them."""
        return torch.isin(tokens[rows, -1], self.ids)


class EndTexts:
    """Ends where the newest token completes one of some texts; the prompt does not count."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        # Precomputed over the vocabulary: which token can stand where in which text.
        self._completes = StopStringCriteria(tokenizer, list(texts))

    def __call__(self, tokens: Int[Tensor, "batch so_far"], rows: Int[Tensor, " alive"]) -> Bool[Tensor, " alive"]:
        """Whether the tokens so far end with a token that completes a text."""
        return self._completes(tokens[rows], None)


class EndAny:
    """Ends where one of several does."""

    def __init__(self, each: Sequence[Ends]):
        self.each = each

    def __call__(self, tokens: Int[Tensor, "batch so_far"], rows: Int[Tensor, " alive"]) -> Bool[Tensor, " alive"]:
        """Whether any of them ends these rows."""
        return torch.stack([ends(tokens, rows) for ends in self.each]).any(0)


def response_ends(
    settings: RolloutSettings,
    eos_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
) -> Ends:
    """The models' own ends, and those that the run asks for."""
    ids = EndIds([*eos_ids, *settings.stop_ids], device)
    return EndAny([ids, EndTexts(settings.stop, tokenizer)]) if settings.stop else ids
