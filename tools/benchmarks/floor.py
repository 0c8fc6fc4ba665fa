"""The least time that a rollout can take on this machine, from two measured rates.

Every product y = xWᵀ of a forward must do 2·rows·|W| operations and read W once, so it takes at least
max(2·rows·|W| / matrix rate, bytes of W / memory bandwidth). Summed over what the algorithm cannot do without:

- each model reads the prompts and all response tokens but the last, each once, in as many forwards as it made; were
  they not of equal size, they would take longer;
- both heads make one row of logits for each response token, the student's in as many products, the teacher's in one.

Attention, norms, drawing and the keys and values read back are left out: what they take is distance to the floor, and
so is arithmetic that the two rates do not explain, as at few rows.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from tools.benchmarks.timing import seconds

_SIDE, _BYTES = 2048, 2**28


def matrix_rate(device: str, dtype: torch.dtype, repeats: int = 7) -> float:
    """Operations a second in a large square product; the best of several."""
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * _SIDE**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(repeats))


def bandwidth(device: str, repeats: int = 7) -> float:
    """Bytes a second that a sum reads from memory; the best of several."""
    numbers = torch.ones(_BYTES // 4, device=device)
    numbers.sum()
    return _BYTES / min(seconds(numbers.sum) for _ in range(repeats))


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Of the layers' matrices, and of the head's."""
    decoder: Any = model.base_model
    matrices = sum(weight.numel() for weight in decoder.layers.parameters() if weight.ndim == 2)
    return matrices, model.get_output_embeddings().weight.numel()


def mixed_rollout_floor(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    calls: tuple[int, int],
    rates: tuple[float, float],
) -> float:
    """Seconds, as derived above; `prompt_tokens` over all rows, `calls` of student and teacher, `rates` of matrix
    products and of memory."""
    operations, memory = rates
    item = teacher.dtype.itemsize

    def product(row_count: float, weights: int) -> float:
        return max(2 * row_count * weights / operations, item * weights / memory)

    def forwards(model: PreTrainedModel, count: int, head_count: int) -> float:
        layers, head = parameters(model)
        reading = count * product((prompt_tokens + rows * (new_tokens - 1)) / count, layers)
        return reading + head_count * product(rows * new_tokens / head_count, head)

    return forwards(student, calls[0], calls[0]) + forwards(teacher, calls[1], 1)
