"""Run configurations as plain dictionaries: what the doctor says of one, changes to it, a run folder that it began."""

import json
from pathlib import Path
from typing import Any

from distill.config import Config, dump
from distill.doctor import examine


def problems(config: dict[str, Any], world_size: int | None = 2) -> list[str]:
    return [str(problem) for problem in examine(Config.model_validate(config), world_size).problems]


def change(config: dict, dotted: str, value: object) -> dict:
    section, key = dotted.split(".")
    return config | {section: config[section] | {key: value}}


def started(good: dict, **changes: Any) -> None:
    """A run folder with a checkpoint, as `good` with `changes` would have left it."""
    folder = Path(good["run"]["folder"])
    (folder / "checkpoints" / "step-0000001").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(Config.model_validate(good | changes)))
    (folder / "checkpoints" / "latest").write_text("step-0000001")
    state = {"state": {"step": 1}, "world_size": 2, "tp_size": 1}
    (folder / "checkpoints" / "step-0000001" / "state.json").write_text(json.dumps(state))
