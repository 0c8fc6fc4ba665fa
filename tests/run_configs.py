"""Run configurations as plain dictionaries: what the doctor says of one, changes to it, a run folder that it began."""

from pathlib import Path
from typing import Any

from torch import Tensor

from distill.checkpoint.catalog import Found, RunState, publish
from distill.checkpoint.disk import write_file
from distill.checkpoint.tensor_file import TensorFile, serialise
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
    checkpoint(folder, 1, world_size=2)
    (folder / "config.yaml").write_text(dump(Config.model_validate(good | changes)))


def checkpoint(folder: Path, step: int, world_size: int = 1, **tensors: dict[str, Tensor]) -> Path:
    """A whole checkpoint of one small file, and a safetensors file for each of `tensors`; its folder."""
    root = folder / "checkpoints"
    partial = root / f"step-{step:07d}.partial"
    partial.mkdir(parents=True)
    files = {"weights": write_file(partial / "weights", lambda file: file.write(b"weights"))}
    for name, content in tensors.items():
        path = partial / f"{name.replace('_', '-')}.safetensors"
        files[path.name] = write_file(path, lambda file, its=content: serialise(TensorFile(its), file))
    publish(root, Found(f"step-{step:07d}", RunState(step=step), world_size, 1, files))
    return root / f"step-{step:07d}"
