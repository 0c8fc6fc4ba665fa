"""Whether the settings make sense for the chosen objective."""

from distill.checks.report import Report
from distill.config import Config
from distill.objective_settings import DistillmSettings, MiniLLMSettings

_SAMPLING = ("alpha", "coins", "temperature", "top_k", "top_p", "samples_per_prompt", "teacher_cache")
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
        if name in rollout.model_fields_set and given != default:
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


def _unread(config: Config) -> tuple[str, ...]:
    """Settings of `rollout` that this run never looks at; validation takes the others."""
    objective = config.objective
    if not objective.samples:
        return (*_SAMPLING, *_ROUNDS)
    return _ROUNDS if isinstance(objective, DistillmSettings) else ()


def note_on_sampling(config: Config, report: Report) -> None:
    """What a run on a mix of its own and recorded responses means to sample is the student alone, used once."""
    objective, rollout = config.objective, config.rollout
    if objective.samples and objective.reads_responses and (rollout.alpha or rollout.inner_epochs > 1):
        report.notices.append(
            f"{objective.name}: rollouts hold {rollout.alpha:.0%} of the teacher's own tokens and serve "
            f"{rollout.inner_epochs} times; for the student's own, fresh ones: rollout.alpha=0 rollout.inner_epochs=1"
        )
