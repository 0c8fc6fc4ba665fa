"""TAID: its target and gradient against autograd, the way of t by hand and at its bounds."""

import math
from typing import Any

import pytest
import torch
from test_kd import objective, recorded
from test_minillm_formulas import over

from distill.objectives import divergences


def taid(**settings: Any) -> Any:
    return objective(name="taid", **settings)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_loss_is_the_kl_from_the_interpolated_target(t: float) -> None:
    batch, student, teacher = recorded()
    terms = taid(start=t).loss(over(student), teacher.__getitem__, batch)
    target = ((1 - t) * student.detach() + t * teacher).log_softmax(-1)
    expected = divergences.forward_kl(student.log_softmax(-1), target).sum()
    torch.testing.assert_close(terms.total, expected, rtol=1e-10, atol=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(total, student) for total in (terms.total, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    if t == 0:
        assert float(got.abs().max()) < 1e-12, "the student is its own target"


def test_tokens_that_the_teacher_rules_out_give_no_nan() -> None:
    batch, student, teacher = recorded()
    teacher[:, 0] = -torch.inf
    for t in (0.0, 0.5, 1.0):
        total = taid(start=t).loss(over(student), teacher.__getitem__, batch).total
        assert bool(total.isfinite())
        assert bool(torch.autograd.grad(total, student)[0].isfinite().all())


def test_three_steps_by_hand() -> None:
    """Losses 2, 1, 3 at α = 0.2, momentum 0.5, on a line that stays behind."""
    objective = taid(start=0.4, end=1.0, momentum=0.5, step_size=0.2)
    objective.memory = objective.advance({"loss/taid": 2.0}, 0.0)
    assert objective.memory == {"t": 0.4, "momentum": 0.0, "loss": 2.0}
    objective.memory = objective.advance({"loss/taid": 1.0}, 0.0)
    first = 0.5 * 0.5
    t = 0.4 + 0.2 / (1 + math.exp(-first)) * 0.6
    assert objective.memory["momentum"] == pytest.approx(first)
    assert objective.memory["t"] == pytest.approx(t)
    objective.memory = objective.advance({"loss/taid": 3.0}, 0.0)
    second = 0.5 * first + 0.5 * (1 - 3) / 1
    assert objective.memory["t"] == pytest.approx(t + 0.2 / (1 + math.exp(-second)) * (1 - t))


def test_t_never_falls_behind_its_line_and_ends_at_its_end() -> None:
    objective, steps = taid(start=0.2, end=0.9, step_size=1e-3), 50
    seen = []
    for step in range(steps):
        objective.memory = objective.advance({"loss/taid": 5.0 + (-1) ** step}, (step + 1) / steps)
        seen.append(objective.memory["t"])
        assert seen[-1] >= 0.2 + 0.7 * (step + 1) / steps - 1e-12
    assert seen == sorted(seen)
    assert seen[-1] == 0.9
