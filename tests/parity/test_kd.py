"""KD, GKD and sampled-token policy gradient: the whole loss of a micro-batch against autograd and naive loops, fp64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from test_minillm_formulas import over, random_rollouts
from torch import Tensor

from distill.data.batches import TokenBatch
from distill.objective_settings import ObjectiveSettings
from distill.objectives import build, divergences


def objective(**settings: Any) -> Any:
    return build(TypeAdapter(ObjectiveSettings).validate_python(settings))


def recorded(seed: int = 0) -> tuple[TokenBatch, Tensor, Tensor]:
    """A batch of recorded responses with both models' logits."""
    rollouts, student, teacher = random_rollouts(seed=seed)
    names = ("prompt_ids", "prompt_lengths", "response_ids", "response_lengths")
    return TokenBatch(**{name: getattr(rollouts, name) for name in names}), student.requires_grad_(), teacher


KNOBS: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {"alpha": 0.2},
    "skew_rkl": {"alpha": 0.2},
    "akl": {"mu": 0.6},
    "tvd": {},
}


@pytest.mark.parametrize("divergence", KNOBS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_kd_equals_autograd(divergence: str, temperature: float, ce_weight: float) -> None:
    batch, student, teacher = recorded()
    settings = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight, **KNOBS[divergence]}
    terms = objective(name="kd", **settings).loss(over(student), teacher.__getitem__, batch)
    (got,) = torch.autograd.grad(terms.total, student)

    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    soft = getattr(divergences, divergence)(log_q, log_p, **KNOBS[divergence]).sum() * temperature**2
    targets = batch.response_ids[batch.response_mask]
    hard = torch.nn.functional.cross_entropy(student, targets, reduction="sum")
    expected = (1 - ce_weight) * soft + ce_weight * hard
    torch.testing.assert_close(terms.total, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got, torch.autograd.grad(expected, student)[0], rtol=1e-8, atol=1e-10)
    assert float(terms.metrics[f"loss/{divergence}"]) == pytest.approx(float(soft), rel=1e-10)


def test_cross_entropy_is_left_out_on_rollouts() -> None:
    rollouts, student, teacher = random_rollouts()
    with_ce, without = (
        objective(name="kd", ce_weight=c).loss(over(student), teacher.__getitem__, rollouts).total for c in (0.7, 0.0)
    )
    assert float(with_ce) == float(without)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_distillm2_takes_each_kind_of_response_its_own_way(beta: float) -> None:
    batch, student, teacher = recorded()
    rollouts, sampled, sampled_teacher = random_rollouts(seed=1)
    both = objective(name="distillm2", alpha=0.2, beta=beta)
    for rows, z_q, z_p, name, weight in (
        (batch, student, teacher, "skew_kl", 2 - beta),
        (rollouts, sampled.requires_grad_(), sampled_teacher, "skew_rkl", beta),
    ):
        terms = both.loss(over(z_q), z_p.__getitem__, rows)
        plain = getattr(divergences, name)(z_q.log_softmax(-1), z_p.log_softmax(-1), 0.2).sum()
        torch.testing.assert_close(terms.total, weight * plain, rtol=1e-10, atol=1e-12)
        (got,), (expected,) = (torch.autograd.grad(total, z_q) for total in (terms.total, weight * plain))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)
        assert float(terms.metrics[f"loss/{name}"]) == pytest.approx(float(plain), rel=1e-10)


@pytest.mark.parametrize("kind", ["recorded", "sampled"])
def test_uld_compares_as_far_as_both_readings_reach(kind: str) -> None:
    batch, student, _ = recorded()
    if kind == "sampled":
        batch, student, _ = random_rollouts()
        student.requires_grad_()
    teacher = torch.randn(len(student), 13, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    reach = (batch.response_lengths - 2).clamp_min(0)
    c = 0.3
    batch = replace(batch, teacher_lengths=reach)
    terms = objective(name="uld", ce_weight=c).loss(over(student), teacher.__getitem__, batch)
    distance = divergences.sorted_distance(student.log_softmax(-1), teacher.log_softmax(-1))
    counted = [n for n, (row, t) in enumerate(batch.response_mask.nonzero().tolist()) if t < int(reach[row])]
    assert 0 < len(counted) < len(student)
    targets = batch.response_ids[batch.response_mask]
    hard = torch.nn.functional.cross_entropy(student, targets, reduction="sum")
    expected = (1 - c) * distance[counted].sum() + c * hard if kind == "recorded" else distance[counted].sum()
    torch.testing.assert_close(terms.total, expected, rtol=1e-10, atol=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(total, student) for total in (terms.total, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


def test_gkd_is_jsd() -> None:
    batch, student, teacher = recorded()
    totals = [
        objective(**settings).loss(over(student), teacher.__getitem__, batch).total
        for settings in ({"name": "gkd", "beta": 0.2}, {"name": "kd", "divergence": "jsd", "beta": 0.2})
    ]
    assert float(totals[0]) == float(totals[1])


@pytest.mark.parametrize("clip", [None, 0.4])
def test_opd_is_the_policy_gradient_of_the_sampled_token(clip: float | None) -> None:
    batch, student, teacher = random_rollouts()
    opd = objective(name="opd", reward_clip=clip)
    (prepared,) = opd.prepare([batch], lambda value: value)
    got = opd.loss(over(student), teacher.__getitem__, prepared).total
    expected, n = 0.0, 0
    for i, length in enumerate(batch.response_lengths.tolist()):
        for t in range(length):
            behavior, token = float(batch.behavior_logprobs[i, t]), int(batch.response_ids[i, t])
            advantage = float(batch.teacher_logprobs[i, t]) - behavior
            if clip is not None:
                advantage = max(-clip, min(clip, advantage))
            ratio = math.exp(float(student[n].log_softmax(-1)[token]) - behavior) * float(
                batch.importance_weights[i, t]
            )
            expected += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
            n += 1
    assert float(got) == pytest.approx(expected, rel=1e-9)


def test_opd_gradient_equals_finite_differences() -> None:
    batch, student, teacher = random_rollouts(rows=3, width=4, vocab=5)
    opd = objective(name="opd")
    (prepared,) = opd.prepare([batch], lambda value: value)

    def loss(logits: Tensor) -> Tensor:
        return opd.loss(over(logits), teacher.__getitem__, prepared).total

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))
