"""TAID: a target that moves from the student to the teacher as the run goes (arXiv 2501.16937)."""

import math
from collections.abc import Mapping

from torch import Tensor

from distill.data.batches import TokenBatch
from distill.models.vocab_shard import VocabShard
from distill.objective_settings import TaidSettings
from distill.objectives.chunked import ChunkLogits, SumOverTokens
from distill.objectives.closed_forms import LOWEST, ValueAndGradient, forward_kl
from distill.objectives.terms import LossTerms, Objective
from distill.objectives.word_level import sum_of_pair


class Taid(Objective):
    """Σ_t KL(softmax((1 − t)·sg(z_q) + t·z_p) ‖ q); `memory["t"]` is the teacher's share t of the target's logits."""

    def __init__(self, settings: TaidSettings):
        super().__init__()
        self.settings = settings
        self.memory = {"t": settings.start, "momentum": 0.0}

    def loss(self, student: SumOverTokens, teacher: ChunkLogits | None, batch: TokenBatch) -> LossTerms:
        """The sum over one micro-batch. The target is a constant, so the gradient is q − p_t."""
        return sum_of_pair(self._divergence, "taid", student, teacher, batch)

    def _divergence(self, z_q: Tensor, z_p: Tensor, tokens: slice, shard: VocabShard) -> ValueAndGradient:
        # A share 0 of a token that is ruled out must be 0, not 0 · inf.
        target = z_q.clamp_min(LOWEST).lerp(z_p.clamp_min(LOWEST), self.memory["t"])
        log_q, log_target = shard.log_softmax(z_q, target)
        return forward_kl(log_q, log_target, shard)

    def advance(self, figures: Mapping[str, float], progress: float) -> dict[str, float]:
        """t moves on: along its straight line, or beyond it by α·sigmoid(m)·(1 − t), m the momentum of the loss's
        relative fall."""
        s, memory, loss = self.settings, self.memory, figures["loss/taid"]
        t, momentum, gain = memory["t"], memory["momentum"], 0.0
        if before := memory.get("loss"):
            momentum = s.momentum * momentum + (1 - s.momentum) * (before - loss) / before
            # The sigmoid, in a form that cannot overflow.
            gain = s.step_size * (1 + math.tanh(momentum / 2)) / 2 * (1 - t)
        line = s.end - (s.end - s.start) * (1 - progress)
        return {"t": min(s.end, max(line, t + gain)), "momentum": momentum, "loss": loss}
