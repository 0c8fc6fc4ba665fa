"""Losses on given text: SFT, and the plain-text term L_PT of MiniLLM."""

from jaxtyping import Float, Int
from torch import Tensor

from distill.data.batches import TokenBatch
from distill.models.vocab_shard import VocabShard
from distill.objectives.chunked import ChunkLogits, SumOverTokens
from distill.objectives.divergences import entropy, exact
from distill.objectives.terms import LossTerms, Objective


def soft_and_hard_cross_entropy(
    student: SumOverTokens,
    teacher: ChunkLogits | None,
    targets: Int[Tensor, " n"],
    soft_weight: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Σ of (1 − s)·CE + s·soft-CE, −Σ_v p_v log q_v, and Σ of the student's entropy; zeros for no tokens.

    ∂/∂logits = q − ((1 − s)·onehot + s·p). Vocabulary-parallel, three all-reduces a chunk of tokens.
    """
    soft = soft_weight if teacher is not None else 0.0
    entropies: list[Tensor] = []

    def evaluate(logits: Tensor, tokens: slice, shard: VocabShard) -> tuple[Tensor, Tensor]:
        of_teacher = [exact(teacher(tokens))] if soft and teacher is not None else []
        log_q, *log_p = shard.log_softmax(exact(logits), *of_teacher)
        gradient = shard.add_at(log_q.exp(), targets[tokens], soft - 1)
        parts = [shard.at(log_q, targets[tokens]), entropy(log_q)]
        for p in (logprobs.exp() for logprobs in log_p):
            parts.append((p * log_q).sum(-1))
            gradient -= soft * p
        hard, spread, *expected = (values.sum() for values in shard.sum(*parts))
        entropies.append(spread)
        return (soft - 1) * hard - soft * sum(expected), gradient

    total = student(evaluate)
    return total, sum(entropies, start=total.new_zeros(()))


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
