"""Every formula of MiniLLM against loops written from its equation, in fp64."""

import itertools
import math

import pytest
import torch
from over_logits import sum_over_logits
from torch import Tensor

from distill.data.batches import Rollouts
from distill.objective_settings import MiniLLMSettings
from distill.objectives.chunked import SumOverTokens
from distill.objectives.minillm import MiniLLM
from distill.objectives.returns import reward_to_go, token_rewards, whiten
from distill.objectives.supervised import plain_text_loss
from distill.rollout.sampling import importance_weights

PRESETS = ["paper", "lmops", "default"]


def random_rollouts(rows: int = 5, width: int = 7, vocab: int = 11, seed: int = 0) -> tuple[Rollouts, Tensor, Tensor]:
    """Rollouts of unequal lengths with student and teacher logits [N, V] at their real tokens, fp64."""
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
    return rollouts, 2 * normal(tokens, vocab), 2 * normal(tokens, vocab)


def over(logits: Tensor) -> SumOverTokens:
    """The student's side of a loss, from whole logits."""
    return lambda evaluate: sum_over_logits(logits, evaluate)


def naive_advantages(batches: list[Rollouts], s: MiniLLMSettings) -> list[list[list[float]]]:
    """Rewards, reward-to-go, normalisation and whitening, one token at a time."""
    returns = []
    for batch in batches:
        table = []
        for i, length in enumerate(batch.response_lengths.tolist()):
            r = [
                (float(batch.teacher_logprobs[i, t]) - float(batch.behavior_logprobs[i, t])) / s.reward_scale
                for t in range(length)
            ]
            if s.reward_clip is not None:
                r = [max(-s.reward_clip, min(s.reward_clip, value)) for value in r]
            row = []
            for t in range(length):
                start = t if s.first_reward == "current" else t + 1
                terms = [s.gamma ** (k - t) * r[k] for k in range(start, length)]
                total = sum(terms)
                row.append(total / len(terms) if s.length_normalised and terms else total)
            table.append(row)
        returns.append(table)
    if s.whitening == "tokens":
        values = [v for table in returns for row in table for v in row]
        return [[[_standardise(v, values) for v in row] for row in table] for table in returns]
    if s.whitening == "padded_micro_batch":
        out = []
        for table in returns:
            width = max(map(len, table))
            window = [v for row in table for v in row] + [0.0] * sum(width - len(row) for row in table)
            out.append([[_standardise(v, window) for v in row] for row in table])
        return out
    return returns


def _standardise(value: float, values: list[float]) -> float:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return (value - mean) / math.sqrt(variance + 1e-8)


def naive_loss(
    batch: Rollouts, student: Tensor, teacher: Tensor, advantages: list[list[float]], s: MiniLLMSettings
) -> float:
    """Long + Single summed over one micro-batch, token by token, vocabulary entry by entry."""
    total, n = 0.0, 0
    for i, length in enumerate(batch.response_lengths.tolist()):
        for t in range(length):
            q = _softmax(student[n].tolist())
            p = _softmax(teacher[n].tolist())
            weight = float(batch.importance_weights[i, t])
            token = int(batch.response_ids[i, t])
            ratio = q[token] / math.exp(float(batch.behavior_logprobs[i, t])) * weight
            a = advantages[i][t]
            clipped = min(max(ratio, 1 - s.ratio_clip), 1 + s.ratio_clip)
            total += max(-a * ratio, -a * clipped)
            single = sum(qv * (math.log(qv) - math.log(pv)) for qv, pv in zip(q, p, strict=True))
            if s.single_step:
                total += single * weight if s.weighted_single_step else single
            n += 1
    return total


def _softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(v - top) for v in logits]
    return [e / sum(exps) for e in exps]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("change", [{}, {"length_normalised": False}, {"single_step": False}, {"reward_clip": 0.3}])
def test_loss_equals_naive_loop(preset: str, change: dict[str, object]) -> None:
    settings = MiniLLMSettings.model_validate({"name": "minillm", "preset": preset} | change)
    batch, student, teacher = random_rollouts()
    other, *_ = random_rollouts(rows=3, seed=1)
    objective = MiniLLM(settings)
    prepared = objective.prepare([batch, other], lambda value: value)
    expected = naive_advantages([batch, other], settings)
    for got, table in zip(prepared, expected, strict=True):
        for i, row in enumerate(table):
            assert got.advantages[i, : len(row)].tolist() == pytest.approx(row, abs=1e-9)
            assert got.advantages[i, len(row) :].abs().sum() == 0
    terms = objective.loss(over(student), teacher.__getitem__, prepared[0])
    assert float(terms.total) == pytest.approx(naive_loss(batch, student, teacher, expected[0], settings), rel=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_equals_finite_differences(preset: str) -> None:
    objective = MiniLLM(MiniLLMSettings.model_validate({"name": "minillm", "preset": preset}))
    batch, student, teacher = random_rollouts(rows=3, width=4, vocab=5)
    (prepared,) = objective.prepare([batch], lambda value: value)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: objective.loss(over(logits), teacher.__getitem__, prepared).total, (student,)
    )


def test_teacher_and_advantages_carry_no_gradient() -> None:
    objective = MiniLLM(MiniLLMSettings.model_validate({"name": "minillm"}))
    batch, student, teacher = random_rollouts()
    (prepared,) = objective.prepare([batch], lambda value: value)
    prepared.advantages.requires_grad_()
    student.requires_grad_()
    teacher.requires_grad_()
    objective.loss(over(student), teacher.__getitem__, prepared).total.backward()
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
    settings = MiniLLMSettings.model_validate(
        {"name": "minillm", "preset": "paper", "length_normalised": False, "weighted_single_step": False}
    )
    objective = MiniLLM(settings)

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
        (prepared,) = objective.prepare([rollout], lambda value: value)
        total = objective.loss(over(table[rows]), teacher[rows].__getitem__, prepared).total
        surrogate = surrogate + probability.detach() * total
    (expected,) = torch.autograd.grad(kl, table, retain_graph=True)
    (got,) = torch.autograd.grad(surrogate, table)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
def test_importance_weight_is_the_ratio_to_the_mixture(alpha: float) -> None:
    student = torch.tensor([[-0.1, -5.0, -80.0, -torch.inf]])
    teacher = torch.tensor([[-3.0, -0.01, -90.0, -0.5]])
    got = importance_weights(student, teacher, alpha)[0].tolist()
    for w, q, p in zip(got, student[0].exp().double(), teacher[0].exp().double(), strict=True):
        expected = float(q / (alpha * p + (1 - alpha) * q)) if alpha else 1.0
        assert w == pytest.approx(expected, rel=1e-5)
        assert w <= 1 / (1 - alpha) + 1e-6


def test_reward_to_go_worked_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    current = reward_to_go(rewards, mask, 0.5, "current", True)
    assert current.tolist() == [[(1 + 1 + 1) / 3, (2 + 2) / 2, 4.0, 0.0]]
    following = reward_to_go(rewards, mask, 1.0, "next", True)
    assert following.tolist() == [[6 / 2, 4.0, 0.0, 0.0]]


def test_rewards_are_scaled_then_clipped() -> None:
    got = token_rewards(torch.tensor([[-1.0, -9.0]]), torch.tensor([[-2.0, -1.0]]), 0.5, 3.0)
    assert got.tolist() == [[2.0, -3.0]]


def test_whitening_over_tokens_does_not_see_the_split_or_the_padding() -> None:
    batch, *_ = random_rollouts(rows=6)
    whole = whiten([batch.teacher_logprobs], [batch.response_mask], "tokens", lambda v: v)[0]
    parts = batch.split(2)
    halves = whiten([p.teacher_logprobs for p in parts], [p.response_mask for p in parts], "tokens", lambda v: v)
    for start, part in zip(range(0, 6, 2), halves, strict=True):
        torch.testing.assert_close(part, whole[start : start + 2, : part.shape[1]])
    assert float(whole[batch.response_mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(whole[batch.response_mask].var(unbiased=False)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("soft", [0.0, 0.5])
def test_plain_text_loss_equals_naive_loop(soft: float) -> None:
    _, student, teacher = random_rollouts()
    targets = torch.arange(len(student)) % student.shape[1]
    got = plain_text_loss(over(student), teacher.__getitem__, targets, soft).total
    expected = 0.0
    for n, target in enumerate(targets.tolist()):
        q, p = _softmax(student[n].tolist()), _softmax(teacher[n].tolist())
        expected -= (1 - soft) * math.log(q[target]) + soft * sum(
            pv * math.log(qv) for pv, qv in zip(p, q, strict=True)
        )
    assert float(got) == pytest.approx(expected, rel=1e-9)
