"""Divergences between student and teacher at every response token: KD, GKD, DistiLLM and DistiLLM-2."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from distill.data.batches import Rollouts, TokenBatch
from distill.models.vocab_shard import VocabShard
from distill.objective_settings import Distillm2Settings, Divergence, KdSettings
from distill.objectives import closed_forms
from distill.objectives.chunked import ChunkLogits, SumOverTokens
from distill.objectives.closed_forms import ClosedForm, ValueAndGradient, tempered
from distill.objectives.divergences import exact
from distill.objectives.terms import LossTerms, Objective

Pair = Callable[[Float[Tensor, "c vocab"], Float[Tensor, "c teacher_vocab"], slice, VocabShard], ValueAndGradient]
"""From both models' logits, at least fp32, their place among the tokens and in the vocabulary: values, and the gradient
at the student's logits, which may be overwritten."""


def sum_of_pair(
    pair: Pair,
    name: str,
    student: SumOverTokens,
    teacher: ChunkLogits | None,
    batch: TokenBatch,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> LossTerms:
    """Σ_t weight·D_t + ce_weight·CE_t over a micro-batch; the metric `loss/<name>` is Σ_t D_t.

    Vocabulary-parallel, three all-reduces a chunk of tokens, and three more where cross-entropy takes part.
    """
    assert teacher is not None
    targets = batch.response_ids[batch.response_mask]
    metrics: dict[str, Tensor] = {}

    def evaluate(logits: Tensor, tokens: slice, shard: VocabShard) -> tuple[Tensor, Tensor]:
        values, gradient = pair(exact(logits), exact(teacher(tokens)), tokens, shard)
        divergence = values.sum()
        sums, total, gradient = {f"loss/{name}": divergence}, weight * divergence, gradient.mul_(weight)
        if ce_weight:
            (log_q,), y = shard.log_softmax(exact(logits)), targets[tokens]
            (logprobs,) = shard.sum(shard.at(log_q, y))
            ce = -logprobs.sum()
            sums["loss/ce"] = ce
            total = total + ce_weight * ce
            gradient = shard.add_at(gradient.add_(log_q.exp(), alpha=ce_weight), y, -ce_weight)
        for key, value in sums.items():
            metrics[key] = metrics.get(key, 0.0) + value
        return total, gradient

    total = student(evaluate)
    return LossTerms(total, metrics)


def as_pair(form: ClosedForm, temperature: float = 1.0) -> Pair:
    """A divergence of logits, τ² D(softmax(z_q/τ), softmax(z_p/τ))."""
    return lambda z_q, z_p, _, shard: tempered(form, z_q, z_p, temperature, shard)


class Kd(Objective):
    """Σ_t (1 − c)·τ² D(q_t, p_t) + c·CE, both gradients in closed form."""

    def __init__(self, divergence: Divergence, temperature: float = 1.0, ce_weight: float = 0.0, **knobs: float):
        super().__init__()
        self.divergence, self.ce_weight = divergence, ce_weight
        self.pair = as_pair(partial(getattr(closed_forms, divergence), **knobs), temperature)

    @classmethod
    def of(cls, settings: KdSettings) -> "Kd":
        """As the user says."""
        knobs = {"beta": settings.beta, "alpha": settings.alpha, "mu": settings.mu}
        given = {name: value for name, value in knobs.items() if value is not None}
        return cls(settings.divergence, settings.temperature, settings.ce_weight, **given)

    def loss(self, student: SumOverTokens, teacher: ChunkLogits | None, batch: TokenBatch) -> LossTerms:
        """The sum over one micro-batch. A rollout has no ground truth, so c is 0 there."""
        hard = 0.0 if isinstance(batch, Rollouts) else self.ce_weight
        return sum_of_pair(self.pair, self.divergence, student, teacher, batch, 1 - hard, hard)


class Distillm2(Objective):
    """(2 − β)·skew KL on the teacher's responses, β·skew reverse KL on the student's (arXiv 2503.07067)."""

    def __init__(self, settings: Distillm2Settings):
        super().__init__()
        self.settings = settings

    def loss(self, student: SumOverTokens, teacher: ChunkLogits | None, batch: TokenBatch) -> LossTerms:
        """The sum over one micro-batch, which is all of one kind."""
        sampled, beta = isinstance(batch, Rollouts), self.settings.beta
        name: Literal["skew_kl", "skew_rkl"] = "skew_rkl" if sampled else "skew_kl"
        pair = as_pair(partial(getattr(closed_forms, name), alpha=self.settings.alpha))
        return sum_of_pair(pair, name, student, teacher, batch, weight=beta if sampled else 2 - beta)
