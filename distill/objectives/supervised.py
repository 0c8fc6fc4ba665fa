"""Losses on given text: SFT, and the plain-text term L_PT of MiniLLM."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.data.batches import TokenBatch
from distill.objectives.chunked import ChunkLogits, SumOverTokens
from distill.objectives.divergences import entropy, log_probabilities
from distill.objectives.terms import LossTerms, Objective


def cross_entropy(logprobs: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """−log q(target) at each position."""
    return -logprobs.gather(-1, targets[:, None]).squeeze(-1)


def add_at(
    gradient: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"], amount: float | Float[Tensor, " n"]
) -> Float[Tensor, "n vocab"]:
    """Add, in place, to each row's target."""
    gradient[torch.arange(len(targets), device=targets.device), targets] += amount
    return gradient


def soft_and_hard_cross_entropy(
    student: SumOverTokens,
    teacher: ChunkLogits | None,
    targets: Int[Tensor, " n"],
    soft_weight: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Σ of (1 − s)·CE + s·soft-CE, −Σ_v p_v log q_v, and Σ of the student's entropy.

    ∂/∂logits = q − ((1 − s)·onehot + s·p).
    """
    soft = soft_weight if teacher is not None else 0.0
    entropies: list[Tensor] = []

    def evaluate(logits: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        log_q = log_probabilities(logits)
        gradient = add_at(log_q.exp(), targets[tokens], soft - 1)
        loss = (1 - soft) * cross_entropy(log_q, targets[tokens]).sum()
        if soft and teacher is not None:
            p = log_probabilities(teacher(tokens)).exp()
            loss = loss - soft * (p * log_q).sum()
            gradient -= soft * p
        entropies.append(entropy(log_q).sum())
        return loss, gradient

    total = student(evaluate)
    return total, torch.stack(entropies).sum()


def plain_text_loss(
    student: SumOverTokens,
    teacher: ChunkLogits | None,
    targets: Int[Tensor, " n"],
    soft_weight: float,
) -> LossTerms:
    """L_PT summed over tokens: CE on plain text, a share of it as soft cross-entropy to the teacher."""
    total, _ = soft_and_hard_cross_entropy(student, teacher, targets, soft_weight)
    return LossTerms(total, {"loss/lm": total.detach()})


class Sft(Objective):
    """Cross-entropy on the recorded responses."""

    def loss(self, student: SumOverTokens, teacher: ChunkLogits | None, batch: TokenBatch) -> LossTerms:
        """Σ −log q(y_t | y_<t, x) over the responses."""
        targets = batch.response_ids[batch.response_mask]
        total, student_entropy = soft_and_hard_cross_entropy(student, None, targets, 0.0)
        return LossTerms(total, {"loss/sft": total.detach(), "student/entropy": student_entropy})
