"""Whether the best student can be chosen, and the run ended, as the settings say."""

from distill.checks.report import Report
from distill.config import Config


def check_selection(config: Config, report: Report) -> None:
    """What `evaluation.metric`, `seeds`, `patience` and `min_improvement` need of the run."""
    settings = config.evaluation

    def needs(holds: bool, name: str, wrong: str, mend: str) -> None:
        report.check(holds, f"evaluation.{name}", getattr(settings, name), wrong, mend)

    if config.data.valid is None:
        defaults = type(settings).model_fields
        for name in ("metric", "seeds", "patience"):
            asked = getattr(settings, name) != defaults[name].default
            needs(not asked, name, "there are no validation records", "give data.valid, or remove it")
    else:
        needs(
            config.teacher_scores or settings.metric != "reverse_kl",
            "metric",
            f"objective {config.objective.name} has no teacher that reads the student's tokens",
            "give loss or rouge_l",
        )
        needs(
            settings.seeds == 1 or config.validation_samples,
            "seeds",
            f"objective {config.objective.name} is validated by its loss, nothing is sampled",
            "remove it, or give evaluation.metric=rouge_l",
        )
        wrong = "the run is validated at its end alone, which leaves nothing to be patient about"
        needs(not settings.patience or settings.every > 0, "patience", wrong, "give evaluation.every, or remove it")
    read = settings.patience > 0 or settings.min_improvement == 0
    needs(read, "min_improvement", "only evaluation.patience reads it", "give evaluation.patience, or remove it")
