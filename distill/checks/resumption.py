"""Whether a run folder can be continued with these settings and ranks."""

from typing import Any

from distill.checkpoint import latest
from distill.checks.report import Report
from distill.config import RESOLVED, Config, load
from distill.errors import BadInput
from distill.objective_settings import DistillmSettings


def check_resumption(config: Config, world_size: int | None, report: Report) -> None:
    """A run folder that holds a checkpoint must get the settings and the ranks that wrote it."""
    try:
        found = latest(config.run.folder)
    except BadInput as error:
        report.problems += error.problems
        return
    if found is None:
        return
    for field_name, now, before in _changed_settings(config):
        wrong = f"the run in {config.run.folder} was started with {before!r}"
        report.check(False, field_name, now, wrong, "give the old value, or another run.folder")
    if world_size is None:
        return
    layout, saved = (world_size, config.parallel.student_tp), (found.world_size, found.tp_size)
    report.check(
        layout == saved,
        "run.folder",
        str(config.run.folder),
        f"its checkpoint was written by {saved[0]} ranks at TP {saved[1]}, these are {layout[0]} at TP {layout[1]}",
        f"start {saved[0]} ranks, or another run.folder",
    )


# May differ between a run and its continuation: how long it goes on, what is watched or kept of it, and the memory
# that vLLM samples in.
_FREE = (
    "evaluation.",
    "checkpoint.",
    "fault.",
    "log.",
    "optim.steps",
    "optim.max_minutes",
    "parallel.timeout_minutes",
    "rollout.vllm_memory",
)


def _is_free(name: str, config: Config) -> bool:
    # What distillm adapts to is measured on these records.
    adapts = isinstance(config.objective, DistillmSettings) and name == "evaluation.prompts"
    return name.startswith(_FREE) and not adapts


def _changed_settings(config: Config) -> list[tuple[str, object, object]]:
    """Settings that differ from those the run folder was started with: name, value now, value then."""
    copy = config.run.folder / RESOLVED
    if not copy.is_file():
        return []
    ours, theirs = (_flat(settings.model_dump(mode="json")) for settings in (config, load(copy)))
    names = [name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)]
    return [(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys(names) if not _is_free(name, config)]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
