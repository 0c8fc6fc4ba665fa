"""What a plan needs of a DeepSpeed JSON."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.checks.report import Report
from distill.deepspeed_settings import read_deepspeed_json
from distill.errors import BadInput


@dataclass(frozen=True)
class Zero:
    """What counts of a DeepSpeed JSON; sizes in parameters, DeepSpeed 0.19's own defaults where it says nothing."""

    stage: int
    reduce_bucket: int
    prefetch_bucket: int
    persistence: int
    max_live: int
    max_reuse: int
    sub_group: int
    overlap: bool
    offload_optimizer: bool
    offload_parameters: bool

    @classmethod
    def of(cls, path: Path) -> "Zero":
        """The settings in `path`.

        Raises:
            BadInput: no such file, no JSON object, or values that are none; all at once.
        """
        read = _Reader(path)
        stage = read.stage()
        number, offloaded = read.number, read.offloaded
        zero = cls(
            stage=stage,
            reduce_bucket=number("reduce_bucket_size", 5e8),
            prefetch_bucket=number("prefetch_bucket_size", 5e7),
            persistence=number("param_persistence_threshold", 1e5),
            max_live=number("max_live_parameters", 1e9),
            max_reuse=number("max_reuse_distance", 1e9),
            sub_group=number("sub_group_size", 1e9),
            overlap=read.switch("overlap_comm", stage == 3),
            offload_optimizer=offloaded("offload_optimizer"),
            offload_parameters=offloaded("offload_param") and stage == 3,
        )
        if read.report.problems:
            raise BadInput(read.report.problems)
        return zero


class _Reader:
    """Takes one value after the other of a DeepSpeed JSON's `zero_optimization`, and notes what is none."""

    def __init__(self, path: Path):
        self.path, self.report = path, Report()
        given = read_deepspeed_json(path).get("zero_optimization", {})
        self._note(isinstance(given, dict), "", given, "an object")
        given = given if isinstance(given, dict) else {}
        self.zero: dict[str, Any] = {key: value for key, value in given.items() if value != "auto"}

    def stage(self) -> int:
        """0 to 3."""
        found = self.zero.get("stage", 0)
        return int(found) if self._note(type(found) is int and 0 <= found <= 3, ".stage", found, "0, 1, 2 or 3") else 0

    def number(self, name: str, default: float) -> int:
        """Of parameters; the older name counts where the newer is not given."""
        key = f"stage3_{name}" if f"stage3_{name}" in self.zero else name
        found = self.zero.get(key, default)
        fine = type(found) in (int, float) and math.isfinite(found) and found >= 0
        return int(found) if self._note(fine, f".{key}", found, "a number of 0 or more") else int(default)

    def switch(self, name: str, default: bool) -> bool:
        """True or false."""
        found = self.zero.get(name, default)
        return bool(found) if self._note(isinstance(found, bool), f".{name}", found, "true or false") else default

    def offloaded(self, name: str) -> bool:
        """Whether it names a device."""
        found = self.zero.get(name, {})
        if not self._note(
            isinstance(found, dict), f".{name}", found, 'an object such as {"device": "cpu"}, or nothing'
        ):
            return False
        device, known = found.get("device", "none"), ("none", "cpu", "nvme")
        self._note(device in known, f".{name}.device", device, f"one of {', '.join(known)}")
        return bool(device != "none")

    def _note(self, holds: bool, key: str, value: object, wanted: str) -> bool:
        self.report.check(holds, f"zero_optimization{key}", value, f"in {self.path}", f"give {wanted}")
        return holds
