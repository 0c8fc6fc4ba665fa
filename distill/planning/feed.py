"""What feeds the optimizer steps, as `distill.sources` and `distill.replay` do: how often a round is sampled, of how
many rows, and what the teacher reads beside it."""

from dataclasses import dataclass

from distill.config import Config
from distill.objective_settings import Distillm2Settings, DistillmSettings, MiniLLMSettings, Mixable


@dataclass(frozen=True)
class Feed:
    """Averages over a run; rows are counted over all ranks."""

    round: int = 0
    """Rollouts that are sampled together."""
    rounds: float = 0.0
    """Of them for one optimizer step."""
    kept: int = 0
    """Rollouts that later steps need, at most."""
    paired: int = 0
    """Recorded responses that the teacher reads with each round and that are kept like it."""
    read: float = 0.0
    """Share of the steps whose responses the teacher reads only in the loss: recorded ones."""
    plain: bool = False
    """Whether a step takes as much plain text too."""
    plain_read: bool = False
    """Whether the teacher reads it."""

    @classmethod
    def of(cls, config: Config) -> "Feed":
        """As the objective takes its responses."""
        objective, per_round, batch = config.objective, config.rollout.per_round, config.optim.batch_size
        if isinstance(objective, DistillmSettings):
            return _replay(objective, config)
        if isinstance(objective, Distillm2Settings):
            return cls(per_round, 1 / _steps(config, batch // 2), kept=per_round, paired=per_round)
        if not objective.samples:
            return cls(read=1.0 if objective.needs_teacher else 0.0)
        share = objective.on_policy if isinstance(objective, Mixable) else 1.0
        plain = isinstance(objective, MiniLLMSettings) and config.data.plain_text is not None
        soft = isinstance(objective, MiniLLMSettings) and objective.lm_soft_weight > 0
        return cls(per_round, share / _steps(config, batch), per_round, 0, 1 - share, plain, plain and soft)


def _steps(config: Config, batch: int) -> int:
    """Steps that one round lasts for, of `batch` rollouts each."""
    return max(config.rollout.per_round // max(batch, 1), 1) * config.rollout.inner_epochs


def _replay(settings: DistillmSettings, config: Config) -> Feed:
    """As if validation loss rose at every look: the most that DistiLLM samples. Each round is one batch, and the buffer
    fills with them."""
    steps, batch = config.optim.steps, config.optim.batch_size
    replayed = sampled = 0.0
    for step in range(steps):
        chance = min(settings.start + settings.increase * (step // settings.adapt_every), 1.0)
        replayed += chance
        sampled += chance * (1 - step / steps)
    capacity = max(settings.replay // batch, 1)
    return Feed(batch, sampled / steps, kept=min(capacity, steps) * batch, read=1 - replayed / steps)
