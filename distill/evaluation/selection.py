"""Which student is the best of a run so far, and when waiting for a better one is over.

A pure function of the validations' figures: all ranks and a resumed run decide alike.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distill.config import Config, Metric

Memory = dict[str, float]
_FALLING: tuple[Metric, ...] = ("loss", "reverse_kl")


@dataclass(frozen=True)
class Selection:
    """How one run chooses: by which figure, and with how much patience."""

    metric: Metric
    patience: int
    min_improvement: float

    @classmethod
    def of(cls, config: Config) -> "Selection":
        """As the settings say."""
        return cls(config.validation_metric, config.evaluation.patience, config.evaluation.min_improvement)

    @property
    def rises(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric not in _FALLING

    def score(self, figure: float) -> float:
        """To be maximised; and back, from a score to its figure."""
        return figure if self.rises else -figure

    def is_better(self, score: float, best: float | None) -> bool:
        """Whether a student beats the best so far; any student beats none, and one of a figure that is not a number."""
        return best is None or math.isnan(best) or score > best

    def look(self, score: float, memory: Mapping[str, float]) -> Memory:
        """What to remember after a validation: the score that the next must beat, and how many have not.

        The bar moves with improvements that count: many small ones come to one.
        """
        bar = memory.get("bar")
        if math.isfinite(score) and (bar is None or score - bar > self.min_improvement):
            return {"bar": score, "failed": 0}
        return {**memory, "failed": memory.get("failed", 0) + 1}

    def verdict(self, memory: Mapping[str, float]) -> str | None:
        """Why the run is over, if patience is at its end."""
        failed = int(memory.get("failed", 0))
        if not self.patience or failed < self.patience:
            return None
        amount = f" by more than {self.min_improvement:g}" if self.min_improvement else ""
        since = f"since it was {self.score(memory['bar']):.4g}" if "bar" in memory else "to a number"
        times = f"{failed} validation{'s' if failed > 1 else ''}"
        return f"valid/{self.metric} has not improved{amount} in {times} {since} (evaluation.patience)"
