"""Random micro-batches in fp64 with both models' logits, and the same rollouts as the reference writes them."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from reference.sampling import Rollout
from torch import Tensor

from distill.data.batches import Rollouts, TokenBatch
from distill.objective_settings import ObjectiveSettings
from distill.objectives import build


def objective(**settings: Any) -> Any:
    """Build the objective of a config with these settings."""
    return build(TypeAdapter(ObjectiveSettings).validate_python(settings))


def random_rollouts(rows: int = 5, width: int = 7, vocab: int = 11, seed: int = 0) -> tuple[Rollouts, Tensor, Tensor]:
    """Rollouts of unequal lengths with student and teacher logits [N, V] at their real tokens."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[0] = width
    mask = torch.arange(width) < lengths[:, None]
    rollouts = Rollouts(
        prompt_ids=torch.ones(rows, 3, dtype=torch.long),
        prompt_lengths=torch.full((rows,), 3),
        response_ids=torch.randint(0, vocab, (rows, width), generator=g) * mask,
        response_lengths=lengths,
        behavior_logprobs=(-normal(rows, width).abs() - 1) * mask,
        teacher_logprobs=(-normal(rows, width).abs() - 1) * mask,
        importance_weights=(torch.rand(rows, width, generator=g, dtype=torch.float64) * 1.25) * mask,
        from_teacher=mask & False,
        ended=lengths < width,
    )
    tokens = int(lengths.sum())
    return rollouts, (2 * normal(tokens, vocab)).requires_grad_(), 2 * normal(tokens, vocab)


def recorded(rollouts: Rollouts) -> TokenBatch:
    """The same tokens as recorded responses."""
    return TokenBatch(**{field.name: getattr(rollouts, field.name) for field in fields(TokenBatch)})


def as_reference(batch: Rollouts) -> list[Rollout]:
    """The rows without their padding."""
    found = []
    for row, length in enumerate(batch.response_lengths.tolist()):
        names = ("response_ids", "behavior_logprobs", "teacher_logprobs", "importance_weights")
        columns = [getattr(batch, name)[row, :length].tolist() for name in names]
        found.append(Rollout(batch.prompt_ids[row].tolist(), *columns))
    return found


def check_in_bf16(loss: Callable[[Tensor, Tensor], Tensor], definition: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Whether a loss of bf16 logits is the definition's of the same logits, and its gradient but for its rounding.

    Both take a student's and a teacher's logits. Measured: 1.3e-6 at most, and 1.9e-3.
    """
    _, student, teacher = random_rollouts(vocab=500)
    student, teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    exact = student.detach().double().requires_grad_()
    got, wanted = loss(student, teacher), definition(exact, teacher.double())
    assert got.dtype == torch.float32
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (gradient,), (slope,) = torch.autograd.grad(got, student), torch.autograd.grad(wanted, exact)
    assert float((gradient.double() - slope).norm() / slope.norm()) < 2.5e-3
