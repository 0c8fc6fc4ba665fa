"""Answers known beforehand: models that have learnt theirs by heart, and plain loops for texts and their figures.

Nothing here is taken from the code under test: plain torch and transformers, one row at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)


def learn_by_heart(model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]], steps: int = 80) -> None:
    """Train until the likeliest answer to each prompt is its own; a prompt with two answers gives each half the time.

    Args:
        model: trained in place, with Adam over all rows at once.
        rows: ids of a prompt, and of the answer to it with what ends it.
        steps: of the optimizer.
    """
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


def greedy(model: PreTrainedModel, prompt: list[int], limit: int, ends: list[int]) -> list[int]:
    """The likeliest token each time until one of `ends` or the limit, as plain transformers write it."""
    settings = {"do_sample": False, "max_new_tokens": limit, "eos_token_id": ends, "pad_token_id": ends[0]}
    found: list[int] = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    return found


@torch.no_grad()
def log_probs(model: PreTrainedModel, prompt: list[int], ids: list[int]) -> Tensor:
    """[len(ids), vocabulary], fp64: what the model says at each place of a response."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)
