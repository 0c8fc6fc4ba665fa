"""Whether a run folder can be continued with these settings and ranks."""

from typing import Any

from distill.checkpoint.catalog import newest
from distill.checks.report import Report
from distill.config import RESOLVED, Config, load
from distill.objective_settings import DistillmSettings


def check_resumption(config: Config, world_size: int | None, report: Report) -> None:
    """A run folder that holds a checkpoint must get the settings that it was written with; the layout may differ."""
    folder = config.run.folder
    found, damaged = newest(folder)
    for tag, wrong in damaged.items():
        report.notices.append(f"checkpoint {tag} cannot be used: {wrong}")
    if found is None:
        wrong = f"none of its checkpoints can be used ({', '.join(damaged)})"
        report.check(not damaged, "run.folder", str(folder), wrong, "put one back, or start in another folder")
        return
    for field_name, now, before in _changed_settings(config):
        wrong = f"the run in {folder} was started with {before!r}"
        report.check(False, field_name, now, wrong, "give the old value, or another run.folder")
    layout, saved = (world_size, config.parallel.student_tp), (found.world_size, found.tp_size)
    if world_size is not None and layout != saved:
        told = f"by {saved[0]} ranks at TP {saved[1]}; it will be dealt out anew to {layout[0]} at TP {layout[1]}"
        report.notices.append(f"checkpoint {found.tag} was written {told}")


# May differ between a run and its continuation: where it lies, how long it goes on, how it is spread over ranks, what
# is watched or kept of it, and the memory that vLLM samples in.
_FREE = (
    "run.folder",
    "evaluation.",
    "checkpoint.",
    "fault.",
    "log.",
    "optim.steps",
    "optim.max_minutes",
    "parallel.",
    "rollout.vllm_memory",
)


def _is_free(name: str, config: Config, before: Config) -> bool:
    if name == "evaluation.metric":  # the best figure so far is one of this
        return config.validation_metric == before.validation_metric
    # What distillm adapts to is measured on these records.
    adapts = isinstance(config.objective, DistillmSettings) and name == "evaluation.prompts"
    return name.startswith(_FREE) and not adapts


def _changed_settings(config: Config) -> list[tuple[str, object, object]]:
    """Settings that differ from those the run folder was started with: name, value now, value then."""
    copy = config.run.folder / RESOLVED
    if not copy.is_file():
        return []
    before = load(copy)
    ours, theirs = (_flat(settings.model_dump(mode="json")) for settings in (config, before))
    names = [name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)]
    bound = [name for name in dict.fromkeys(names) if not _is_free(name, config, before)]
    return [(name, ours.get(name), theirs.get(name)) for name in bound]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
