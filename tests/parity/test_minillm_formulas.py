"""MiniLLM's advantages, loss, gradient and figures against the reference's loops, in fp64."""

import itertools
from typing import Any

import pytest
import torch
from over_logits import over
from random_batches import as_reference, check_in_bf16, objective, random_rollouts
from reference import minillm
from reference.sampling import Rollout
from torch import Tensor

from distill.data.batches import Rollouts

PRESETS = ["paper", "lmops", "default"]
CHANGES: list[dict[str, Any]] = [
    {},
    {"length_normalised": False, "gamma": 0.7},
    {"single_step": False, "ratio_clip": 0.4},
    {"reward_clip": 0.3, "reward_scale": 1.6},
    {"weighted_single_step": True, "first_reward": "next"},
    {"weighted_single_step": False, "first_reward": "current"},
]


def by_loop(
    rollouts: list[Rollout], advantages: list[list[float]], student: Tensor, teacher: Tensor, knobs: dict[str, Any]
) -> tuple[Tensor, dict[str, float]]:
    """The loss and the figures of one micro-batch, summed over its responses."""
    total, sums = torch.zeros((), dtype=torch.float64), dict.fromkeys(minillm.FIGURES, 0.0)
    parts = [len(rollout.response) for rollout in rollouts]
    rows = zip(rollouts, advantages, student.split(parts), teacher.split(parts), strict=True)
    for row in rows:
        value, figures = minillm.loss(*row, knobs)
        total, sums = total + value, {name: sums[name] + figures[name] for name in sums}
    return total, sums


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_loss_gradient_and_figures_equal_the_loop(preset: str, change: dict[str, Any]) -> None:
    built = objective(name="minillm", preset=preset, **change)
    knobs = built.settings.model_dump()
    batches, logits = [], []
    for rows, seed in ((5, 0), (3, 1)):
        batch, *pair = random_rollouts(rows=rows, seed=seed)
        batches.append(batch)
        logits.append(pair)
    rollouts = [as_reference(batch) for batch in batches]
    table = minillm.advantages([*rollouts[0], *rollouts[1]], knobs, ranks=1, micro_batch=5)
    expected = [table[:5], table[5:]]
    for got, rows_of, advantages, (student, teacher) in zip(
        built.prepare(batches, lambda value: value), rollouts, expected, logits, strict=True
    ):
        for i, row in enumerate(advantages):
            assert got.advantages[i, : len(row)].tolist() == pytest.approx(row, abs=1e-9)
            assert got.advantages[i, len(row) :].abs().sum() == 0
        terms = built.loss(over(student), teacher.__getitem__, got)
        total, sums = by_loop(rows_of, advantages, student, teacher, knobs)
        assert float(terms.total) == pytest.approx(float(total), rel=1e-9)
        (gradient,), (wanted,) = (torch.autograd.grad(value, student) for value in (terms.total, total))
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-11)
        assert {name: float(value) for name, value in terms.metrics.items()} == pytest.approx(sums, rel=1e-9)


def test_bf16_logits_are_taken_as_they_are() -> None:
    built = objective(name="minillm", preset="lmops")
    knobs = built.settings.model_dump()
    (batch,) = built.prepare([random_rollouts(vocab=500)[0]], lambda value: value)
    rollouts = as_reference(batch)
    advantages = minillm.advantages(rollouts, knobs, ranks=1, micro_batch=5)
    check_in_bf16(
        lambda student, teacher: built.loss(over(student), teacher.__getitem__, batch).total,
        lambda student, teacher: by_loop(rollouts, advantages, student, teacher, knobs)[0],
    )


def test_teacher_and_advantages_carry_no_gradient() -> None:
    built = objective(name="minillm")
    batch, student, teacher = random_rollouts()
    (prepared,) = built.prepare([batch], lambda value: value)
    prepared.advantages.requires_grad_()
    teacher.requires_grad_()
    built.loss(over(student), teacher.__getitem__, prepared).total.backward()
    assert teacher.grad is None
    assert prepared.advantages.grad is None
    assert student.grad.abs().sum() > 0


def test_expected_gradient_is_that_of_the_sequence_kl() -> None:
    """Long + Single, enumerated over all sequences with their probabilities, is exactly ∇KL[q‖p] (Eq. 2 and 3)."""
    vocab, length = 3, 3
    prefixes = [prefix for n in range(length) for prefix in itertools.product(range(vocab), repeat=n)]
    g = torch.Generator().manual_seed(3)
    table = torch.randn(len(prefixes), vocab, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(len(prefixes), vocab, generator=g, dtype=torch.float64)
    row_of = {prefix: i for i, prefix in enumerate(prefixes)}
    log_q, log_p = table.log_softmax(-1), teacher.log_softmax(-1)
    built = objective(name="minillm", preset="paper", length_normalised=False, weighted_single_step=False)

    kl, surrogate = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sequence in itertools.product(range(vocab), repeat=length):
        rows = [row_of[sequence[:t]] for t in range(length)]
        q = torch.stack([log_q[row, token] for row, token in zip(rows, sequence, strict=True)])
        p = torch.stack([log_p[row, token] for row, token in zip(rows, sequence, strict=True)])
        probability = q.sum().exp()
        kl = kl + probability * (q.sum() - p.sum())
        rollout = Rollouts(
            prompt_ids=torch.ones(1, 1, dtype=torch.long),
            prompt_lengths=torch.ones(1, dtype=torch.long),
            response_ids=torch.tensor([sequence]),
            response_lengths=torch.tensor([length]),
            behavior_logprobs=q.detach()[None],
            teacher_logprobs=p[None],
            importance_weights=torch.ones(1, length, dtype=torch.float64),
            from_teacher=torch.zeros(1, length, dtype=torch.bool),
            ended=torch.ones(1, dtype=torch.bool),
        )
        (prepared,) = built.prepare([rollout], lambda value: value)
        total = built.loss(over(table[rows]), teacher[rows].__getitem__, prepared).total
        surrogate = surrogate + probability.detach() * total
    (expected,) = torch.autograd.grad(kl, table, retain_graph=True)
    (got,) = torch.autograd.grad(surrogate, table)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
