"""The tensors that pass between rooms. Legend: B batch, P prompt, R response, T = P + R, V vocabulary, H hidden.

Prompts are left-padded and responses right-padded, so column P is every row's first response token and one slice of
the model's output predicts all responses. Padding is known by lengths; no token id means "padding".
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Prompts with their responses (EOS included where the response is complete)."""

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_lengths: Int[Tensor, " batch"]
    response_ids: Int[Tensor, "batch response"]
    response_lengths: Int[Tensor, " batch"]
    _: KW_ONLY
    teacher_hidden: Float[Tensor, "batch response hidden"] | None = None
    """The teacher's final hidden state that predicts each response token; on the host where it is kept there."""
    teacher_lengths: Int[Tensor, " batch"] | None = None
    """How many response tokens a teacher with another tokenizer has a state for; it reads the text its own way."""

    @property
    def response_mask(self) -> Bool[Tensor, "batch response"]:
        """True at real response tokens, EOS included."""
        columns = torch.arange(self.response_ids.shape[1], device=self.response_ids.device)
        return columns < self.response_lengths[:, None]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def model_inputs(self) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `position_ids`, each [B, T]; positions count real tokens only."""
        prompt_columns = torch.arange(self.prompt_ids.shape[1], device=self.prompt_ids.device)
        prompt_mask = prompt_columns >= self.prompt_ids.shape[1] - self.prompt_lengths[:, None]
        mask = torch.cat([prompt_mask, self.response_mask], 1).long()
        return {
            "input_ids": torch.cat([self.prompt_ids, self.response_ids], 1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        }

    def rows(self, index: Sequence[int] | slice | Tensor) -> Self:
        """The chosen rows, in that order, without the padding that none of them needs."""
        picked: dict[str, Any] = {name: value[_on(value.device, index)] for name, value in self.tensors().items()}
        longest_prompt = int(picked["prompt_lengths"].max())
        longest_response = int(picked["response_lengths"].max())
        for name, value in picked.items():
            if name == "prompt_ids":
                picked[name] = value[:, value.shape[1] - longest_prompt :]
            elif value.ndim > 1:
                picked[name] = value[:, :longest_response]
        return replace(self, **picked)

    def split(self, size: int) -> list[Self]:
        """Micro-batches of `size` rows, each without needless padding."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def clone(self) -> Self:
        """A copy that shares no memory."""
        copied: dict[str, Any] = {name: value.clone() for name, value in self.tensors().items()}
        return replace(self, **copied)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are filled, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Rollouts(TokenBatch):
    """Sampled responses with all that both models said of them while they were sampled.

    Log-probabilities are fp32, of the untempered models over the shared vocabulary; values at padding are 0.
    """

    behavior_logprobs: Float[Tensor, "batch response"]
    """log q_old(y_t): the student when the rollout was sampled."""
    teacher_logprobs: Float[Tensor, "batch response"]
    """log p(y_t); 0 where no teacher scored."""
    importance_weights: Float[Tensor, "batch response"]
    """w_t = q_old(y_t) / p̃(y_t) of the tempered, truncated proposals (Eq. 5)."""
    from_teacher: Bool[Tensor, "batch response"]
    """Whether the coin gave this token to the teacher."""
    ended: Bool[Tensor, " batch"]
    """Whether the response ended by itself rather than at the length limit."""
    teacher_forwards: Int[Tensor, " batch"] | None = None
    """How often the teacher has read the row's response tokens, all together: as often as there are, if never twice."""
    student_forwards: Int[Tensor, " batch"] | None = None
    """The same of the student, where the builtin decoder sampled."""
    student_hidden: Float[Tensor, "batch response hidden"] | None = None
    """The student's, where the rollout worker was asked to keep them."""
    advantages: Float[Tensor, "batch response"] | None = None
    """Normalised reward-to-go, filled in by the objective for one optimizer step."""


B = TypeVar("B", bound=TokenBatch)


def pad_rows(rows: Sequence[Tensor], width: int, left: bool = False) -> Tensor:
    """Stack rows of unequal length [L_i, …] into [B, width, …], padding with zeros on one side."""
    out = rows[0].new_zeros((len(rows), width, *rows[0].shape[1:]))
    for target, row in zip(out, rows, strict=True):
        target[width - len(row) if left else 0 :][: len(row)] = row
    return out


def _on(device: torch.device, index: Sequence[int] | slice | Tensor) -> Sequence[int] | slice | Tensor:
    return index.to(device) if isinstance(index, Tensor) else index


def concatenate(parts: Sequence[B]) -> B:
    """Join batches of different widths, padding each to the widest."""
    prompt_width = max(part.prompt_ids.shape[1] for part in parts)
    response_width = max(part.response_ids.shape[1] for part in parts)
    joined: dict[str, Any] = {}
    for name, first in parts[0].tensors().items():
        values = [getattr(part, name) for part in parts]
        if first.ndim > 1:
            left = name == "prompt_ids"
            values = [_widen(value, prompt_width if left else response_width, left) for value in values]
        joined[name] = torch.cat(values)
    return type(parts[0])(**joined)


def _widen(value: Tensor, width: int, left: bool) -> Tensor:
    if value.shape[1] == width:
        return value
    shape = (value.shape[0], width - value.shape[1], *value.shape[2:])
    return torch.cat([value.new_zeros(shape), value] if left else [value, value.new_zeros(shape)], 1)
