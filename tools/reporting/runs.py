"""A run's folder, read: its settings, the records of its steps, its example rollouts."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from distill.config import RESOLVED
from distill.errors import BadInput, Problem
from distill.telemetry import METRICS, SAMPLES
from distill.yaml_file import Unreadable, read_yaml

Record = dict[str, float]


@dataclass(frozen=True)
class Curve:
    """One metric over a run; `steps` rise."""

    steps: Float[ndarray, " n"]
    values: Float[ndarray, " n"]


@dataclass(frozen=True)
class Rollout:
    """A training sample as it was written."""

    step: int
    prompt: str
    response: str
    reward: float | None = None
    """Mean of log p − log q over its tokens, neither scaled nor clipped; None where no teacher scored it."""
    teacher_share: float | None = None


@dataclass(frozen=True)
class Run:
    """What one run has left."""

    name: str
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Section → key → value, as resolved; empty where the folder holds none."""
    records: Sequence[Record] = ()
    """In the file's order; each has its `step`."""
    rollouts: Sequence[Rollout] = ()

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Each metric; of two records of one step the later one counts."""
        points: dict[str, dict[float, float]] = {}
        for record in self.records:
            for name, value in record.items():
                points.setdefault(name, {})[record["step"]] = value
        points.pop("step", None)
        return {
            name: Curve(*np.array(sorted(found.items()), dtype=np.float64).T) for name, found in sorted(points.items())
        }

    @property
    def steps(self) -> int:
        """The last step on record."""
        return int(max(record["step"] for record in self.records))

    def last(self, metric: str) -> float | None:
        """Its latest value."""
        return float(self.curves[metric].values[-1]) if metric in self.curves else None

    def setting(self, section: str, key: str) -> Any:
        """One setting; None where there is none."""
        found = self.settings.get(section)
        return found.get(key) if isinstance(found, Mapping) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Each by its folder's name, or by its path where two share one.

    Raises:
        BadInput: a folder that is no run's, or is given twice.
    """
    names = [folder.resolve().name for folder in folders]
    found: list[Run] = []
    for folder, name in zip(folders, names, strict=True):
        name = name if names.count(name) == 1 else str(folder)
        if any(name == run.name for run in found):
            raise BadInput(Problem("RUN", str(folder), "is given twice", "name each run once"))
        found.append(read_run(folder, name))
    return found


def read_run(folder: Path, name: str) -> Run:
    """The run in `folder`. Lines that a kill has cut off are left out.

    Raises:
        BadInput: no metrics there, or settings that cannot be read.
    """
    path = folder / METRICS
    if not path.is_file():
        raise BadInput(Problem("RUN", str(folder), f"no {METRICS} in it", "give the folder of a run"))
    records = [record for line in _lines(path) if (record := _record(line))]
    if not records:
        raise BadInput(Problem("RUN", str(folder), f"its {METRICS} holds no record", "wait for the run's first step"))
    rollouts = [rollout for line in _lines(folder / SAMPLES) if (rollout := _rollout(line))]
    return Run(name, folder, _settings(folder / RESOLVED), records, rollouts)


def _lines(path: Path) -> Iterator[Any]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def _record(line: Any) -> Record | None:
    """Numbers only; what else may stand there is no metric."""
    if not isinstance(line, dict) or not _is_number(line.get("step")):
        return None
    return {name: float(value) for name, value in line.items() if _is_number(value)}


def _rollout(line: Any) -> Rollout | None:
    if not isinstance(line, dict) or not _is_number(line.get("step")):
        return None
    prompt, response = line.get("prompt"), line.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str):
        return None
    figures = (line.get(name) if _is_number(line.get(name)) else None for name in ("reward", "teacher_share"))
    return Rollout(int(line["step"]), prompt, response, *figures)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = read_yaml(path)
    except Unreadable as error:
        raise BadInput(Problem("RUN", str(path), str(error), "restore the file, or remove it")) from None
    return found if isinstance(found, dict) else {}
