"""Every objective as a config builds it, no knob at its default: its sums and gradient against definitions in fp64.

The definitions are the reference's, one token at a time; the gradient of each is autograd's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from over_logits import over
from random_batches import check_in_bf16, objective, random_rollouts, recorded
from reference import divergences
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
"""A divergence of both models' logits at one token."""


@dataclass
class Case:
    """A config's objective, and its definition."""

    settings: dict[str, Any]
    figure: str
    recorded: Divergence
    sampled: Divergence | None = None
    """On rollouts, where it is another."""
    hard: float = 0.0
    """The share of cross-entropy on recorded responses."""
    weights: tuple[float, float] = (1.0, 1.0)
    """The divergence's factors on recorded responses and on rollouts."""


def defined(name: str, **knobs: float) -> Divergence:
    return partial(divergences.tempered, name, **knobs)


def kd(divergence: str, definition: str, **knobs: float) -> Case:
    settings = {"name": "kd", "divergence": divergence, "temperature": 2.0, "ce_weight": 0.3, **knobs}
    read = knobs if definition == divergence else {}
    return Case(settings, divergence, defined(definition, temperature=2.0, **read), hard=0.3)


def distillm2(beta: float) -> Case:
    settings = {"name": "distillm2", "alpha": 0.3, "beta": beta}
    kinds = defined("skew_kl", alpha=0.3), defined("skew_rkl", alpha=0.3)
    return Case(settings, "skew_kl", *kinds, weights=(2 - beta, beta))


CASES = {
    "kd forward_kl": kd("forward_kl", "forward_kl"),
    "kd reverse_kl": kd("reverse_kl", "reverse_kl"),
    "kd jsd": kd("jsd", "jsd", beta=0.3),
    "kd jsd 0": kd("jsd", "forward_kl", beta=0.0),
    "kd jsd 1": kd("jsd", "reverse_kl", beta=1.0),
    "kd skew_kl": kd("skew_kl", "skew_kl", alpha=0.2),
    "kd skew_kl 0": kd("skew_kl", "forward_kl", alpha=0.0),
    "kd skew_rkl": kd("skew_rkl", "skew_rkl", alpha=0.2),
    "kd skew_rkl 0": kd("skew_rkl", "reverse_kl", alpha=0.0),
    "kd akl": kd("akl", "akl", mu=0.6),
    "kd tvd": kd("tvd", "tvd"),
    "gkd": Case({"name": "gkd", "beta": 0.3, "temperature": 2.0}, "jsd", defined("jsd", beta=0.3, temperature=2.0)),
    "taid": Case({"name": "taid", "start": 0.3}, "taid", partial(divergences.taid, t=0.3)),
    "distillm2 0.7": distillm2(0.7),
    "distillm2 0": distillm2(0.0),
    "distillm2 2": distillm2(2.0),
}
for skew in ("skew_kl", "skew_rkl"):
    settings = {"name": "distillm", "divergence": skew, "alpha": 0.3}
    CASES[f"distillm {skew}"] = Case(settings, skew, defined(skew, alpha=0.3))


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """Σ_t −log q(y_t)."""
    return -torch.stack([z.log_softmax(-1)[y] for z, y in zip(student, targets, strict=True)]).sum()


def definition(
    case: Case, is_sampled: bool, student: Tensor, teacher: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its parts without their weights: the divergence and cross-entropy."""
    token = (case.sampled or case.recorded) if is_sampled else case.recorded
    soft = torch.stack([token(z, u) for z, u in zip(student, teacher, strict=True)]).sum()
    hard, share = cross_entropy(student, targets), 0.0 if is_sampled else case.hard
    return (1 - share) * case.weights[is_sampled] * soft + share * hard, soft, hard


@pytest.mark.parametrize("is_sampled", [False, True], ids=["recorded", "sampled"])
@pytest.mark.parametrize("name", CASES)
def test_sums_and_gradient_equal_the_definition(name: str, is_sampled: bool) -> None:
    case = CASES[name]
    rollouts, student, teacher = random_rollouts(seed=3)
    batch = rollouts if is_sampled else recorded(rollouts)
    terms = objective(**case.settings).loss(over(student), teacher.__getitem__, batch)
    targets = batch.response_ids[batch.response_mask]
    expected, soft, hard = definition(case, is_sampled, student, teacher, targets)
    assert float(terms.total) == pytest.approx(float(expected), rel=1e-10, abs=1e-13)
    (got,), (wanted,) = (torch.autograd.grad(total, student) for total in (terms.total, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)
    figure = "skew_rkl" if is_sampled and case.sampled else case.figure
    figures = {f"loss/{figure}": float(soft)} | ({"loss/ce": float(hard)} if case.hard and not is_sampled else {})
    assert {key: float(value) for key, value in terms.metrics.items()} == pytest.approx(figures, rel=1e-10)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.weights[0]])
def test_bf16_logits_are_taken_as_they_are(name: str) -> None:
    case, batch = CASES[name], recorded(random_rollouts(vocab=500)[0])
    built, targets = objective(**case.settings), batch.response_ids[batch.response_mask]
    check_in_bf16(
        lambda student, teacher: built.loss(over(student), teacher.__getitem__, batch).total,
        lambda student, teacher: definition(case, False, student, teacher, targets)[0],
    )


@pytest.mark.parametrize("kind", ["recorded", "sampled"])
@pytest.mark.parametrize("theirs", [8, 13])
def test_uld_compares_as_far_as_both_readings_reach(kind: str, theirs: int) -> None:
    """A teacher of fewer tokens, and one of more, whose reading is shorter than the student's by two."""
    rollouts, student, _ = random_rollouts()
    teacher = torch.randn(len(student), theirs, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = replace(
        rollouts if kind == "sampled" else recorded(rollouts),
        teacher_lengths=(rollouts.response_lengths - 2).clamp_min(0),
    )
    terms = objective(name="uld", ce_weight=0.3).loss(over(student), teacher.__getitem__, batch)
    (got,) = torch.autograd.grad(terms.total, student)
    distance, n, counted = torch.zeros((), dtype=torch.float64), 0, 0
    for length in batch.response_lengths.tolist():
        for t in range(length):
            if t < length - 2:
                distance, counted = distance + divergences.sorted_distance(student[n], teacher[n]), counted + 1
            n += 1
    assert 0 < counted < n
    share = 0.3 if kind == "recorded" else 0.0
    hard = cross_entropy(student, batch.response_ids[batch.response_mask])
    expected = (1 - share) * distance + share * hard
    assert float(terms.total) == pytest.approx(float(expected), rel=1e-10)
    torch.testing.assert_close(got, torch.autograd.grad(expected, student)[0], rtol=1e-8, atol=1e-12)
    figures = {"loss/uld": float(distance)} | ({"loss/ce": float(hard)} if share else {})
    assert {key: float(value) for key, value in terms.metrics.items()} == pytest.approx(figures, rel=1e-10)


@pytest.mark.parametrize("clips", [{"ratio_clip": 0.5}, {"reward_clip": 0.4, "ratio_clip": 0.1}], ids=str)
def test_opd_is_the_policy_gradient_of_the_sampled_token(clips: dict[str, float]) -> None:
    """A_t = log p − log q_old, clipped; the ratio is q/q_old · w; no later reward, no single step."""
    batch, student, teacher = random_rollouts()
    opd = objective(name="opd", **clips)
    (prepared,) = opd.prepare([batch], lambda value: value)
    total = opd.loss(over(student), teacher.__getitem__, prepared).total
    bound, most, losses = clips.get("reward_clip", torch.inf), clips["ratio_clip"], []
    for n, (i, t) in enumerate(batch.response_mask.nonzero().tolist()):
        behavior = float(batch.behavior_logprobs[i, t])
        advantage = max(-bound, min(bound, float(batch.teacher_logprobs[i, t]) - behavior))
        log_q = student[n].log_softmax(-1)[batch.response_ids[i, t]]
        ratio = (log_q - behavior).exp() * batch.importance_weights[i, t]
        losses.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - most, 1 + most)))
    expected = torch.stack(losses).sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-10)
    (got,), (wanted,) = (torch.autograd.grad(value, student) for value in (total, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)
