"""Whether the settings make sense for the chosen objective."""

from distill.checks.report import Report
from distill.config import Config
from distill.objective_settings import DistillmSettings, MiniLLMSettings, Mixable

_OF_VALIDATION = ("max_new_tokens", "stop", "stop_ids", "gather", "batch")
_ROUNDS = ("per_round", "inner_epochs")


def check_objective(config: Config, report: Report) -> None:
    """What the objective needs that is not there, and what is there that it does not read."""
    objective, rollout, data = config.objective, config.rollout, config.data
    report.check(
        not objective.needs_teacher or config.teacher is not None,
        "teacher",
        None,
        f"objective {objective.name} needs a teacher",
        "add a `teacher:` section with its path",
    )
    for name in _unread(config):
        given, default = getattr(rollout, name), type(rollout).model_fields[name].default
        if name not in rollout.model_fields_set or given == default:
            continue
        if isinstance(objective, Mixable):  # a sweep of on_policy may well reach 0
            report.notices.append(f"rollout.{name}: {objective.name} at on_policy = {objective.on_policy} reads it not")
        else:
            report.check(False, f"rollout.{name}", given, f"objective {objective.name} does not read it", "remove it")
    if data.plain_text and not isinstance(objective, MiniLLMSettings):
        report.check(False, "data.plain_text", str(data.plain_text), "only minillm reads plain text", "remove it")
    report.check(
        not isinstance(objective, DistillmSettings) or data.valid is not None,
        "data.valid",
        None,
        "distillm adapts to validation loss",
        "give validation records",
    )
    report.check(
        not (objective.own_tokenizer and objective.samples and rollout.alpha),
        "rollout.alpha",
        rollout.alpha,
        f"objective {objective.name}: the teacher's tokens are not the student's, it cannot mix into its text",
        "give 0",
    )


def _unread(config: Config) -> list[str]:
    """Settings of `rollout` that this run never looks at."""
    objective = config.objective
    if objective.samples:
        return list(_ROUNDS) if isinstance(objective, DistillmSettings) else []
    # Validation samples alone and at temperature 1.
    samples = config.validation_samples
    return [name for name in type(config.rollout).model_fields if not (samples and name in _OF_VALIDATION)]


def note_on_sampling(config: Config, report: Report) -> None:
    """What a run on a mix of its own and recorded responses means to sample is the student alone, used once."""
    objective, rollout = config.objective, config.rollout
    if not (objective.samples and objective.reads_responses):
        return
    if rollout.alpha:
        found = f"rollouts hold {rollout.alpha:.0%} of the teacher's own tokens"
        report.notices.append(f"{objective.name}: {found}; for the student's own: rollout.alpha=0")
    if rollout.inner_epochs > 1 and "inner_epochs" not in _unread(config):
        found = f"rollouts serve {rollout.inner_epochs} times"
        report.notices.append(f"{objective.name}: {found}; for fresh ones: rollout.inner_epochs=1")
