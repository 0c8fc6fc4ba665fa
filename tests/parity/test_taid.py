"""TAID: its target at each t, and the way of t by hand and at its bounds."""

import math
from typing import Any

import pytest
import torch
from over_logits import over
from random_batches import objective, random_rollouts, recorded
from reference import divergences


def taid(**settings: Any) -> Any:
    return objective(name="taid", **settings)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_loss_follows_t_as_it_moves(t: float) -> None:
    rollouts, student, teacher = random_rollouts()
    moved = taid(start=0.0)
    moved.memory |= {"t": t}
    total = moved.loss(over(student), teacher.__getitem__, recorded(rollouts)).total
    expected = torch.stack([divergences.taid(z, u, t) for z, u in zip(student, teacher, strict=True)]).sum()
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(value, student) for value in (total, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    if t == 0:
        assert float(got.abs().max()) < 1e-12, "the student is its own target"


def test_tokens_that_the_teacher_rules_out_give_no_nan() -> None:
    rollouts, student, teacher = random_rollouts()
    teacher[:, 0] = -torch.inf
    for t in (0.0, 0.5, 1.0):
        total = taid(start=t).loss(over(student), teacher.__getitem__, recorded(rollouts)).total
        assert bool(total.isfinite())
        assert bool(torch.autograd.grad(total, student)[0].isfinite().all())


def test_three_steps_by_hand() -> None:
    """Losses 2, 1, 3 at α = 0.2, momentum 0.8, on a line that stays behind, until it leads; 0.9 is the end of all."""
    objective = taid(start=0.4, end=0.9, momentum=0.8, step_size=0.2)
    objective.memory = objective.advance({"loss/taid": 2.0}, 0.0)
    assert objective.memory == {"t": 0.4, "momentum": 0.0, "loss": 2.0}
    objective.memory = objective.advance({"loss/taid": 1.0}, 0.1)
    first = 0.2 * 0.5
    t = 0.4 + 0.2 / (1 + math.exp(-first)) * 0.6
    assert objective.memory == pytest.approx({"t": t, "momentum": first, "loss": 1.0})
    second = 0.8 * first + 0.2 * (1 - 3) / 1
    later = {"momentum": second, "loss": 3.0}
    found = objective.advance({"loss/taid": 3.0}, 0.0)
    assert found == pytest.approx({"t": t + 0.2 / (1 + math.exp(-second)) * (1 - t), **later})
    assert objective.advance({"loss/taid": 3.0}, 0.7) == pytest.approx({"t": 0.4 + 0.7 * 0.5, **later})
    objective.memory |= {"t": 0.899}
    assert objective.advance({"loss/taid": 3.0}, 0.7)["t"] == 0.9


def test_t_never_falls_behind_its_line_and_ends_at_its_end() -> None:
    objective, steps = taid(start=0.2, end=0.9, step_size=1e-3), 50
    seen = []
    for step in range(steps):
        objective.memory = objective.advance({"loss/taid": 5.0 + (-1) ** step}, (step + 1) / steps)
        seen.append(objective.memory["t"])
        assert seen[-1] >= 0.2 + 0.7 * (step + 1) / steps - 1e-12
    assert seen == sorted(seen)
    assert seen[-1] == 0.9
