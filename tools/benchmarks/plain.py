"""The same work as one would write it with transformers alone: what the rollout's figures are compared with."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from distill.data.batches import TokenBatch


def prompt_inputs(prompts: TokenBatch) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of the prompts alone."""
    inputs = prompts.rows(slice(None)).model_inputs()
    width = prompts.prompt_ids.shape[1]
    return {name: inputs[name][:, :width] for name in ("input_ids", "attention_mask")}


def generate(model: PreTrainedModel, prompts: TokenBatch, new_tokens: int) -> Int[Tensor, "batch response"]:
    """`model.generate`, sampling at temperature 1 from the whole vocabulary, to the last token."""
    sample: Any = model.generate  # typed as a tensor or module by its base class
    ids: Tensor = sample(
        **prompt_inputs(prompts),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids[:, prompts.prompt_ids.shape[1] :]


def mix_and_score(
    student: PreTrainedModel, teacher: PreTrainedModel, prompts: TokenBatch, new_tokens: int, alpha: float
) -> Tensor:
    """Both models at every token, a draw from the mixed probabilities, then one pass of the teacher over it all.

    Returns the teacher's log-probabilities of the responses.
    """
    inputs = prompt_inputs(prompts)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    caches = [DynamicCache(config=model.config) for model in (student, teacher)]
    step, at = ids, positions
    for _ in range(new_tokens):
        q, p = (
            model(step, attention_mask=mask, position_ids=at, past_key_values=cache, logits_to_keep=1)
            .logits[:, -1]
            .float()
            .softmax(-1)
            for model, cache in zip((student, teacher), caches, strict=True)
        )
        step = torch.multinomial(alpha * p + (1 - alpha) * q, 1)
        ids, mask, at = torch.cat([ids, step], 1), torch.cat([mask, torch.ones_like(step)], 1), at[:, -1:] + 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = teacher(ids, attention_mask=mask, position_ids=positions, logits_to_keep=new_tokens + 1).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, ids[:, -new_tokens:, None]).squeeze(-1)
