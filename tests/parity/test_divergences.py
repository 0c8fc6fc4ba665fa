"""Every divergence: by hand, at its limits, at extreme logits, and its closed form against autograd and differences."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.objectives import closed_forms, divergences
from distill.objectives.closed_forms import tempered

CASES: dict[str, tuple[str, dict[str, float]]] = {
    "forward_kl": ("forward_kl", {}),
    "reverse_kl": ("reverse_kl", {}),
    "jsd 0.1": ("jsd", {"beta": 0.1}),
    "jsd 0.5": ("jsd", {"beta": 0.5}),
    "jsd 0": ("jsd", {"beta": 0.0}),
    "jsd 1": ("jsd", {"beta": 1.0}),
    "skew_kl": ("skew_kl", {"alpha": 0.1}),
    "skew_kl 0": ("skew_kl", {"alpha": 0.0}),
    "skew_rkl": ("skew_rkl", {"alpha": 0.1}),
    "skew_rkl 0": ("skew_rkl", {"alpha": 0.0}),
    "tvd": ("tvd", {}),
    "akl": ("akl", {"mu": 0.5}),
    "sorted_distance": ("sorted_distance", {}),
}
each = pytest.mark.parametrize("case", CASES)


def plain(case: str) -> Callable[[Tensor, Tensor], Tensor]:
    name, knobs = CASES[case]
    return partial(getattr(divergences, name), **knobs)


def closed(case: str) -> closed_forms.ClosedForm:
    name, knobs = CASES[case]
    return partial(getattr(closed_forms, name), **knobs)


def logits(rows: int = 6, vocab: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def naive(case: str, q: list[float], p: list[float]) -> float:
    """One position, entry by entry, from the definition."""
    name, knobs = CASES[case]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    def mixed(a: list[float], b: list[float], share: float) -> list[float]:
        return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]

    if name == "forward_kl" or knobs in ({"beta": 0.0},) or case == "skew_kl 0":
        return kl(p, q)
    if name == "reverse_kl" or knobs in ({"beta": 1.0},) or case == "skew_rkl 0":
        return kl(q, p)
    if name == "jsd":
        m = mixed(p, q, knobs["beta"])
        return knobs["beta"] * kl(p, m) + (1 - knobs["beta"]) * kl(q, m)
    if name == "skew_kl":
        return kl(p, mixed(p, q, knobs["alpha"]))
    if name == "skew_rkl":
        return kl(q, mixed(q, p, knobs["alpha"]))
    if name == "tvd":
        return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    if name == "sorted_distance":
        return sum(abs(x - y) for x, y in zip(sorted(p), sorted(q), strict=True))
    mass, head, total = 0.0, 0.0, 0.0
    for x, y in sorted(zip(p, q, strict=True), reverse=True):
        head += abs(x - y) if mass < knobs["mu"] else 0.0
        total += abs(x - y)
        mass += x
    return head / total * kl(p, q) + (1 - head / total) * kl(q, p)


@each
def test_equals_the_naive_sum(case: str) -> None:
    student, teacher = logits()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    values, _ = closed(case)(log_q, log_p)
    for row in range(len(student)):
        expected = naive(case, student[row].softmax(-1).tolist(), teacher[row].softmax(-1).tolist())
        assert float(plain(case)(log_q, log_p)[row]) == pytest.approx(expected, rel=1e-9)
        assert float(values[row]) == pytest.approx(expected, rel=1e-9)


@each
def test_closed_form_is_the_gradient_of_the_plain_one(case: str) -> None:
    student, teacher = logits(rows=20, vocab=11, seed=1)
    student.requires_grad_()
    expected_value = plain(case)(student.log_softmax(-1), teacher.log_softmax(-1))
    (expected,) = torch.autograd.grad(expected_value.sum(), student)
    value, gradient = closed(case)(student.detach().log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(value, expected_value.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# AKL's shares are constants by definition: a finite difference would move them too.
@pytest.mark.parametrize("case", [case for case in CASES if case != "akl"])
def test_plain_gradient_equals_finite_differences(case: str) -> None:
    student, teacher = logits(rows=3, vocab=5, seed=2)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: plain(case)(z.log_softmax(-1), teacher.log_softmax(-1)), (student,))


def test_worked_by_hand() -> None:
    """q = (½, ½), p = (¾, ¼)."""
    log_q, log_p = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.5, 0.5], [0.75, 0.25]))
    for case, expected in {
        "forward_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "reverse_kl": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        "jsd 0.5": 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3))
        + 0.5 * (0.5 * math.log(0.8) + 0.5 * math.log(4 / 3)),
        "tvd": 0.25,
        "sorted_distance": 0.5,
    }.items():
        assert float(plain(case)(log_q, log_p)) == pytest.approx(expected, rel=1e-12)


@each
def test_zero_with_no_gradient_where_the_models_agree(case: str) -> None:
    student, _ = logits()
    log_q = student.log_softmax(-1)
    value, gradient = closed(case)(log_q.clone(), log_q.clone())
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [(4, 9), (9, 4)])
def test_sorted_distance_of_vocabularies_of_two_sizes(ours: int, theirs: int) -> None:
    """A token that one of them lacks has probability 0 there."""
    student, teacher = logits(5, ours)[0].requires_grad_(), logits(5, theirs, seed=3)[1]
    expected = divergences.sorted_distance(student.log_softmax(-1), teacher.log_softmax(-1))
    for row in range(5):
        q, p = (sorted(z[row].softmax(-1).tolist(), reverse=True) for z in (student, teacher))
        wide = [abs(a - b) for a, b in zip(q + [0.0] * (9 - ours), p + [0.0] * (9 - theirs), strict=True)]
        assert float(expected[row]) == pytest.approx(sum(wide), rel=1e-12)
    value, gradient = closed_forms.sorted_distance(student.detach().log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-9, atol=1e-12)


def test_jsd_tends_to_the_kls() -> None:
    log_q, log_p = (z.log_softmax(-1) for z in logits())
    near = 1e-7
    to_forward = divergences.jsd(log_q, log_p, near) / near
    to_reverse = divergences.jsd(log_q, log_p, 1 - near) / near
    torch.testing.assert_close(to_forward, divergences.forward_kl(log_q, log_p), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(to_reverse, divergences.reverse_kl(log_q, log_p), rtol=1e-4, atol=1e-6)


EXTREMES = {
    "1e4": torch.tensor([1e4, 0.0, -1e4, 3.0]),
    "-1e4": torch.tensor([-1e4, -1e4, -1e4, 0.0]),
    "masked": torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf]),
    "one-hot": torch.tensor([-torch.inf, -torch.inf, 5.0, -torch.inf]),
    "flat": torch.zeros(4),
}


@each
def test_extreme_logits_give_no_nan(case: str) -> None:
    for student, teacher in itertools.product(EXTREMES, EXTREMES):
        value, gradient = closed(case)(*(EXTREMES[name][None].log_softmax(-1) for name in (student, teacher)))
        assert bool(value.isfinite().all()), (student, teacher)
        assert bool(gradient.isfinite().all()), (student, teacher)
        assert float(value) >= -1e-6, (student, teacher)


@each
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(2, 60),
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_any_shape_and_temperature(case: str, rows: int, vocab: int, seed: int, temperature: float) -> None:
    student, teacher = logits(rows, vocab, seed)
    student.requires_grad_()
    reference = plain(case)((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1))
    expected = reference * temperature**2
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    value, gradient = tempered(closed(case), student.detach(), teacher, temperature)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)
    assert bool((value >= -1e-9).all())


@each
def test_fp32_stays_close_to_fp64(case: str) -> None:
    student, teacher = logits(rows=50, vocab=2000, seed=4, dtype=torch.float32)
    value, gradient = closed(case)(student.log_softmax(-1), teacher.log_softmax(-1))
    exact, slope = closed(case)(student.double().log_softmax(-1), teacher.double().log_softmax(-1))
    assert float((value.double() - exact).norm() / exact.norm()) < 1e-5
    assert float((gradient.double() - slope).norm() / slope.norm()) < 1e-5
