"""Word-level distillation: any divergence, at any temperature, mixed with cross-entropy on recorded responses."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from distill.data.batches import Rollouts, TokenBatch
from distill.objective_settings import KdSettings
from distill.objectives import closed_forms
from distill.objectives.chunked import ChunkLogits, SumOverTokens
from distill.objectives.closed_forms import ClosedForm, tempered
from distill.objectives.divergences import log_probabilities
from distill.objectives.supervised import cross_entropy
from distill.objectives.terms import LossTerms, Reduce


def closed_form(settings: KdSettings) -> ClosedForm:
    """The divergence with its knob set."""
    knobs = {"beta": settings.beta, "alpha": settings.alpha, "mu": settings.mu}
    given = {name: value for name, value in knobs.items() if value is not None}
    return partial(getattr(closed_forms, settings.divergence), **given)


class Kd:
    """Σ_t (1 − c)·τ² D(q_t, p_t) + c·CE, both gradients in closed form."""

    def __init__(self, settings: KdSettings):
        self.settings = settings
        self.form = closed_form(settings)

    def prepare(self, micro_batches: Sequence[TokenBatch], reduce: Reduce) -> Sequence[TokenBatch]:
        """Nothing to prepare."""
        return micro_batches

    def loss(self, student: SumOverTokens, teacher: ChunkLogits | None, batch: TokenBatch) -> LossTerms:
        """The sum over one micro-batch. A rollout has no ground truth, so c is 0 there."""
        assert teacher is not None
        hard = 0.0 if isinstance(batch, Rollouts) else self.settings.ce_weight
        targets = batch.response_ids[batch.response_mask]
        metrics: dict[str, Tensor] = {}

        def evaluate(logits: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
            exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
            z_q, z_p = logits.to(exact), teacher(tokens).to(exact)
            values, gradient = tempered(self.form, z_q, z_p, self.settings.temperature)
            divergence = values.sum()
            sums, total = {f"loss/{self.settings.divergence}": divergence}, divergence
            if hard:
                log_q, y = log_probabilities(logits), targets[tokens]
                ce = cross_entropy(log_q, y).sum()
                slope = log_q.exp()
                slope[torch.arange(len(y), device=y.device), y] -= 1
                sums["loss/ce"] = ce
                total = (1 - hard) * divergence + hard * ce
                gradient = gradient.mul_(1 - hard).add_(slope, alpha=hard)
            for name, value in sums.items():
                metrics[name] = metrics.get(name, 0.0) + value
            return total, gradient

        total = student(evaluate)
        return LossTerms(total, metrics)
