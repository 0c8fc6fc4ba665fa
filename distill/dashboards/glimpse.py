"""What is shown of a round of rollouts: a few as text, all of them as distributions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.data.batches import Rollouts

ROLLOUTS = "samples/rollouts"
"""The name that example rollouts have on every dashboard."""


@dataclass(frozen=True)
class Glimpse:
    """What one rank shows of a round that it has sampled."""

    rows: Sequence[Mapping[str, Any]]
    """Example rollouts as text."""
    distributions: Mapping[str, np.ndarray]
    """Finite values [n] by name, of all rows of this rank."""

    @property
    def columns(self) -> list[str]:
        """What any of the rows has; a figure that is not finite is missing."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def as_text(rollouts: Rollouts, count: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The first `count` rollouts: prompt, response and, where the teacher has scored, mean reward and its share."""
    texts: list[dict[str, Any]] = []
    for row in range(min(count, len(rollouts))):
        one = rollouts.rows([row])
        text: dict[str, Any] = {
            "prompt": tokenizer.decode(one.prompt_ids[0]),
            "response": tokenizer.decode(one.response_ids[0]),
        }
        if one.teacher_forwards is not None:
            text["reward"] = float((one.teacher_logprobs - one.behavior_logprobs).mean())
            text["teacher_share"] = float(one.from_teacher.float().mean())
        texts.append(text)
    return texts


def distributions(rollouts: Rollouts) -> dict[str, np.ndarray]:
    """Response lengths in tokens, importance weights and, where the teacher has scored, each token's log p − log q."""
    mask = rollouts.response_mask
    found = {"response_length": rollouts.response_lengths, "importance_weight": rollouts.importance_weights[mask]}
    if rollouts.teacher_forwards is not None:
        found["reward"] = (rollouts.teacher_logprobs - rollouts.behavior_logprobs)[mask]
    arrays = {f"distribution/{name}": values.double().cpu().numpy() for name, values in found.items()}
    # What a model rules out has no finite reward.
    return {name: values[np.isfinite(values)] for name, values in arrays.items()}
