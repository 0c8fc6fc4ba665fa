"""Cross-entropy, hard and soft: value, closed-form gradient and entropy against autograd of the definition in fp64."""

import pytest
import torch
from over_logits import over
from random_batches import check_in_bf16, objective, random_rollouts, recorded
from torch import Tensor

from distill.objectives.supervised import plain_text_loss, soft_and_hard_cross_entropy

SOFT = pytest.mark.parametrize("soft", [0.0, 0.3, 1.0])


def definition(student: Tensor, teacher: Tensor, targets: Tensor, soft: float) -> Tensor:
    """Σ_t −(1 − s)·log q(y_t) − s·Σ_v p_v log q_v, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for z_q, z_p, target in zip(student, teacher, targets.tolist(), strict=True):
        log_q, p = (z_q.exp() / z_q.exp().sum()).log(), z_p.exp() / z_p.exp().sum()
        total = total - (1 - soft) * log_q[target] - soft * (p * log_q).sum()
    return total


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Both models' logits at 20 tokens, more than one chunk of them, and the targets."""
    _, student, teacher = random_rollouts(rows=9)
    assert len(student) > 20
    return student, teacher, 3 * torch.arange(len(student)) % student.shape[1]


def entropy(logits: Tensor) -> float:
    """Σ_t −Σ_v q_v log q_v."""
    return sum(-float(q * q.log()) for row in logits.detach().softmax(-1) for q in row)


@SOFT
def test_plain_text_loss_and_its_gradient_equal_the_definition(soft: float) -> None:
    student, teacher, targets = problem()
    terms = plain_text_loss(over(student), teacher.__getitem__, targets, soft)
    expected = definition(student, teacher, targets, soft)
    assert float(terms.total) == pytest.approx(float(expected), rel=1e-12)
    assert float(terms.metrics["loss/lm"]) == pytest.approx(float(expected), rel=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(total, student) for total in (terms.total, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    _, spread = soft_and_hard_cross_entropy(over(student), teacher.__getitem__, targets, soft)
    assert float(spread) == pytest.approx(entropy(student), rel=1e-12)


@SOFT
def test_gradient_equals_finite_differences(soft: float) -> None:
    student, teacher, targets = (part[:4] for part in problem())
    student = student.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: soft_and_hard_cross_entropy(over(z), teacher.__getitem__, targets, soft)[0], (student,)
    )


@SOFT
def test_bf16_logits_are_taken_as_they_are(soft: float) -> None:
    def targets(logits: Tensor) -> Tensor:
        return 3 * torch.arange(len(logits))

    check_in_bf16(
        lambda student, teacher: plain_text_loss(over(student), teacher.__getitem__, targets(student), soft).total,
        lambda student, teacher: definition(student, teacher, targets(student), soft),
    )


def test_without_a_teacher_no_share_is_soft() -> None:
    student, teacher, targets = problem()
    total, _ = soft_and_hard_cross_entropy(over(student), None, targets, 0.3)
    expected = definition(student, teacher, targets, 0.0)
    assert float(total) == pytest.approx(float(expected), rel=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(value, student) for value in (total, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["sft", "seqkd"])
def test_sft_is_the_cross_entropy_of_the_recorded_tokens(name: str) -> None:
    rollouts, student, teacher = random_rollouts()
    batch = recorded(rollouts)
    terms = objective(name=name).loss(over(student), None, batch)
    targets = [ids[t] for ids, n in zip(batch.response_ids, batch.response_lengths, strict=True) for t in range(n)]
    expected = definition(student, teacher, torch.stack(targets), 0.0)
    assert float(terms.total) == pytest.approx(float(expected), rel=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(total, student) for total in (terms.total, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    figures = {key: float(value) for key, value in terms.metrics.items()}
    assert figures == pytest.approx({"loss/sft": float(expected), "student/entropy": entropy(student)}, rel=1e-12)
