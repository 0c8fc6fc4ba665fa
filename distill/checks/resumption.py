"""Whether a run folder can be continued with these settings and ranks."""

from typing import Any

from distill.checkpoint.catalog import newest
from distill.checks.report import Report
from distill.config import RESOLVED, Config, load
from distill.objective_settings import DistillmSettings
from distill.optim import learning_rate_factor


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
    if (folder / RESOLVED).is_file():
        _check_settings(config, load(folder / RESOLVED), found.state.step, report)
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


def _check_settings(config: Config, before: Config, step: int, report: Report) -> None:
    """Compare the settings with those `before`, with which the folder was started or last continued, to `step`."""
    ours, theirs = (_flat(settings.model_dump(mode="json")) for settings in (config, before))
    names = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
    free = [name for name in names if _is_free(name, config, before)]
    for name in names:
        if name not in free:
            wrong = f"the run in {config.run.folder} was started with {theirs.get(name)!r}"
            report.check(False, name, ours.get(name), wrong, "give the old value, or another run.folder")
    told = [f"{name} {theirs.get(name)!r} → {ours.get(name)!r}" for name in free if name != "run.folder"]
    if told:
        report.notices.append(f"the run in {config.run.folder} goes on with other settings: {', '.join(told)}")
    optim, old = config.optim, before.optim
    if optim.schedule != "constant" and optim.steps != old.steps and step < optim.steps:
        now, then = (of.lr * learning_rate_factor(step, of) for of in (optim, old))
        other = f"another {optim.schedule} schedule, of {optim.steps} steps instead of {old.steps}"
        report.notices.append(f"optim.steps: {other}; step {step + 1} trains at the rate {now:.3g}, not at {then:.3g}")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
