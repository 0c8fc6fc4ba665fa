"""Drawing one token: proposals, inverse CDF, log-probabilities, importance weights, and the random numbers of a run."""

import itertools
from typing import Any

import pytest
import torch
from goodness_of_fit import chi_square
from reference import chance
from reference.sampling import proposal as defined_proposal
from torch import Tensor

from distill.config import RolloutSettings
from distill.rollout.sampling import (
    coins,
    draw,
    importance_weights,
    logprob_of,
    proposal,
    request_seeds,
    token_uniforms,
)

ROWS = torch.tensor([0, 3, 7])


def bf16_logits() -> Tensor:
    """40 rows of 60 logits, no two of a row alike: ties would leave open what a cut keeps."""
    g = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(60, generator=g) / 8 for _ in range(40)]).bfloat16()


@pytest.mark.parametrize(
    "cut",
    [
        {"temperature": 1.7},
        {"temperature": 0.6, "top_k": 4},
        {"temperature": 1.7, "top_p": 0.8},
        {"top_k": 7, "top_p": 0.55, "temperature": 1.7},
        {"top_k": 60},
        {"top_k": 1},
    ],
    ids=str,
)
def test_proposals_of_bf16_logits_are_tempered_then_cut_in_fp32(cut: dict[str, Any]) -> None:
    logits, settings = bf16_logits(), RolloutSettings(**cut)
    got = proposal(logits, settings)
    assert got.dtype == torch.float32
    wanted = [defined_proposal(row, settings.temperature, settings.top_k, settings.top_p) for row in logits.double()]
    torch.testing.assert_close(got.double().softmax(-1), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-9)
    assert torch.equal(got > -torch.inf, torch.tensor(wanted) > 0)


def test_truncation_keeps_no_more_than_k_of_equals_and_the_token_that_reaches_p() -> None:
    logits = torch.tensor([[2.0, 2.0, 2.0, 0.0]])
    assert int((proposal(logits, RolloutSettings(top_k=2)) > -torch.inf).sum()) == 2
    kept = proposal(torch.tensor([[0.5, 0.3, 0.2]]).log(), RolloutSettings(top_p=0.6)).softmax(-1)
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0]]))


def test_logprobs_of_bf16_logits_are_exact_to_fp32() -> None:
    logits = bf16_logits()
    tokens = torch.arange(len(logits)) * 7 % logits.shape[1]
    got = logprob_of(logits, tokens)
    assert got.dtype == torch.float32
    exact = logits.double().softmax(-1).log()[range(len(logits)), tokens]
    assert float((got.double() - exact).abs().max()) < 1e-5


@pytest.mark.parametrize("likely", [[1], [0, 1], [300, 400], [599]], ids=str)
def test_draw_never_takes_a_token_of_probability_zero(likely: list[int]) -> None:
    """Not even at the ends of the interval, whole blocks of such tokens before or behind."""
    logits = torch.full((1, 600), -torch.inf)
    logits[0, likely] = 0.5
    for u, expected in ((0.0, likely[0]), (1 - 2**-24, likely[-1])):
        assert draw(logits, torch.tensor([u]))[0].tolist() == [expected]


def test_rounding_at_the_edge_of_a_block_leads_to_no_token_of_probability_zero() -> None:
    """Sums in another order differ in the last digit: a number may lie behind the last token of its block."""
    logits = torch.randn(500, 512)
    logits[:, 256:300] = -torch.inf
    edges = logits.double().softmax(-1)[:, :256].sum(-1)
    for step in range(-4, 5):
        drawn, _ = draw(logits, (edges + step * 2**-25).float())
        assert bool((logits.gather(1, drawn[:, None]) > -torch.inf).all())


@pytest.mark.parametrize("vocab", [5, 256, 257, 1500])
def test_draw_inverts_the_cdf(vocab: int) -> None:
    """Blocks or not, a uniform u falls on the token whose cumulative probabilities enclose it."""
    logits = 3 * torch.randn(1, vocab)
    logits[0, torch.randperm(vocab)[: vocab // 3]] = -torch.inf
    uniforms = torch.rand(4000)
    drawn, normaliser = draw(logits.expand(4000, -1), uniforms)
    exact = logits[0].double().softmax(-1).cumsum(-1)
    after = exact[drawn]
    before = torch.where(drawn > 0, exact[(drawn - 1).clamp_min(0)], 0.0)
    assert bool((uniforms >= before - 1e-5).all())
    assert bool((uniforms <= after + 1e-5).all())
    assert bool((logits[0, drawn] > -torch.inf).all())
    assert normaliser.dtype == torch.float32
    torch.testing.assert_close(normaliser.double(), logits[0].double().exp().sum().log().expand(4000))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
def test_importance_weight_is_the_ratio_to_the_mixture(alpha: float) -> None:
    student = torch.tensor([[-0.1, -5.0, -80.0, -torch.inf, -0.2]])
    teacher = torch.tensor([[-3.0, -0.01, -90.0, -0.5, -torch.inf]])
    weights = importance_weights(student, teacher, alpha)
    assert weights.dtype == torch.float32
    probabilities = [(of[0].double().exp()).tolist() for of in (student, teacher)]
    for w, q, p in zip(weights[0].tolist(), *probabilities, strict=True):
        assert w == pytest.approx(q / (alpha * p + (1 - alpha) * q) if alpha else 1.0, rel=1e-5)
        assert w <= 1 / (1 - alpha) + 1e-6


@pytest.mark.parametrize("mode", ["shared", "per_row"])
def test_coins_and_uniforms_are_those_of_seed_round_and_row(mode: str) -> None:
    settings = RolloutSettings(max_new_tokens=200, alpha=0.3, coins=mode)
    for seed, round_index in ((3, 0), (3, 1), (4, 0)):
        flips = coins(settings, seed, round_index, ROWS)
        numbers = token_uniforms(settings, seed, round_index, ROWS)
        assert numbers.dtype == torch.float32
        for place, row in enumerate(ROWS.tolist()):
            given = (seed, round_index, row, 200)
            assert flips[place].tolist() == chance.coins(*given, 0.3, mode == "shared")
            assert numbers[place].tolist() == chance.uniforms(*given)


@pytest.mark.parametrize("mode", ["shared", "per_row"])
def test_no_two_streams_of_random_numbers_are_alike(mode: str) -> None:
    """Another round, row or seed has other numbers, and no row's coins follow from anyone's uniforms."""
    settings = RolloutSettings(max_new_tokens=400, alpha=0.5, coins=mode)
    flips, numbers, requests = {}, {}, set()
    for seed, round_index, row in itertools.product((3, 4), (0, 1), (0, 1)):
        ids = torch.tensor([row])
        shared = () if mode == "shared" else (row,)
        flips[seed, round_index, *shared] = coins(settings, seed, round_index, ids)[0]
        numbers[seed, round_index, row] = token_uniforms(settings, seed, round_index, ids)[0] < 0.5
        requests.add(request_seeds(seed, round_index, ids)[0])
    assert len(requests) == 8
    streams = [*flips.values(), *numbers.values()]
    assert len(streams) == (12 if mode == "shared" else 16)
    for one, other in itertools.combinations(streams, 2):
        # Independent streams agree at half of the 400 places, five standard deviations more or less.
        assert abs(int((one == other).sum()) - 200) < 50


def test_shared_coins_fall_to_the_teacher_as_often_as_alpha_says() -> None:
    settings = RolloutSettings(max_new_tokens=50, alpha=0.2)
    rounds = [coins(settings, 0, index, ROWS) for index in range(400)]
    assert all(bool((flips == flips[0]).all()) for flips in rounds)
    heads = sum(int(flips[0].sum()) for flips in rounds)
    assert chi_square([heads, 20000 - heads], [4000, 16000]) > 1e-4
