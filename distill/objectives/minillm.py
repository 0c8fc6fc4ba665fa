"""MiniLLM: reverse-KL policy gradient, decomposed into an exact single step and a sampled remainder.

Gu, Dong, Wei, Huang, "MiniLLM: On-Policy Distillation of Large Language Models", arXiv 2306.08543.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from distill.data.batches import Rollouts, TokenBatch
from distill.models.vocab_shard import VocabShard
from distill.objective_settings import MiniLLMSettings
from distill.objectives.chunked import ChunkLogits, SumOverTokens
from distill.objectives.closed_forms import reverse_kl_parts
from distill.objectives.divergences import entropy, exact
from distill.objectives.returns import reward_to_go, token_rewards, whiten
from distill.objectives.terms import LossTerms, Objective, Reduce


def clipped_policy_gradient(
    logprobs: Float[Tensor, " n"],
    behavior_logprobs: Float[Tensor, " n"],
    weights: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    clip: float,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """max(−A·ratio, −A·clamp(ratio, 1−ε, 1+ε)) with ratio_t = exp(log q − log q_old)·w_t, and its slope in log q.

    w = q_old/p̃, so at temperature 1 the ratio is q/p̃ of the current student. The slope is −A·ratio, and 0 where the
    clip holds.
    """
    ratio = (logprobs - behavior_logprobs).exp() * weights
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), torch.where(clipped > plain, 0.0, plain)


class MiniLLM(Objective):
    """Long + Single on rollouts. Advantages are prepared once an optimizer step, over all its micro-batches."""

    def __init__(self, settings: MiniLLMSettings):
        super().__init__()
        self.settings = settings

    def prepare(self, micro_batches: Sequence[TokenBatch], reduce: Reduce) -> Sequence[TokenBatch]:
        """Fill in `advantages`: rewards → reward-to-go → length normalisation → whitening."""
        s = self.settings
        rollouts = [batch for batch in micro_batches if isinstance(batch, Rollouts)]
        masks = [batch.response_mask for batch in rollouts]
        returns = [
            reward_to_go(self._rewards(batch), mask, s.gamma, s.first_reward, s.length_normalised)
            for batch, mask in zip(rollouts, masks, strict=True)
        ]
        advantages = whiten(returns, masks, s.whitening, reduce)
        return [replace(batch, advantages=value) for batch, value in zip(rollouts, advantages, strict=True)]

    def _rewards(self, batch: Rollouts) -> Float[Tensor, "batch response"]:
        s = self.settings
        return token_rewards(batch.teacher_logprobs, batch.behavior_logprobs, s.reward_scale, s.reward_clip)

    def loss(self, student: SumOverTokens, teacher: ChunkLogits | None, batch: TokenBatch) -> LossTerms:
        """Σ_t of the clipped policy gradient (Eq. 3, Long) and of the exact KL(q_t‖p_t) (Eq. 3, Single).

        ∂Single/∂logit_v = q_v (d_v − KL) with d = log q − log p, and ∂Long/∂logit_v = slope · (1[v = y] − q_v).
        Vocabulary-parallel, three all-reduces a chunk of tokens: maxima, sums of exponentials, and all other sums.
        """
        assert isinstance(batch, Rollouts)
        assert batch.advantages is not None
        assert teacher is not None
        s, mask = self.settings, batch.response_mask
        targets, behavior = batch.response_ids[mask], batch.behavior_logprobs[mask]
        weights, advantages = batch.importance_weights[mask], batch.advantages[mask].detach()
        single_weights = weights if s.weighted_single_step else torch.ones_like(weights)
        metrics: dict[str, Tensor] = {"reward/mean": self._rewards(batch)[mask].sum()}

        def evaluate(logits: Tensor, tokens: slice, shard: VocabShard) -> tuple[Tensor, Tensor]:
            log_q, log_p = shard.log_softmax(exact(logits), exact(teacher(tokens)))
            y = targets[tokens]
            q, difference, part = reverse_kl_parts(log_q, log_p)
            parts = part, shard.at(log_q, y), entropy(log_q, q), entropy(log_p)
            divergence, logprobs, student_entropy, teacher_entropy = shard.sum(*parts)
            long, slope = clipped_policy_gradient(
                logprobs, behavior[tokens], weights[tokens], advantages[tokens], s.ratio_clip
            )
            single = single_weights[tokens] * divergence
            total = long.sum()
            if s.single_step:
                total = total + single.sum()
                # Both terms have the factor q: w · (d − KL) − slope, in the buffer of d.
                gradient = difference.sub_(divergence[:, None]).mul_(single_weights[tokens, None])
                gradient.sub_(slope[:, None]).mul_(q)
            else:
                gradient = -slope[:, None] * q
            shard.add_at(gradient, y, slope)
            sums = {
                "loss/long": long,
                "loss/single": single,
                "student/reverse_kl": divergence,
                "student/entropy": student_entropy,
                "teacher/entropy": teacher_entropy,
                "policy/clip_fraction": ((slope == 0) & (long != 0)).float(),
                "policy/approx_kl_to_behavior": behavior[tokens] - logprobs,
            }
            for name, values in sums.items():
                metrics[name] = metrics.get(name, 0.0) + values.sum()
            return total, gradient

        total = student(evaluate)
        return LossTerms(total, metrics)
