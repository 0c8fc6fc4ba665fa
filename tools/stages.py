"""A chain of commands that remembers what is finished, how long it took and how much memory it needed."""

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.memory import MemoryWatch


@dataclass(frozen=True)
class Stage:
    """Commands that turn `inputs` into `outputs` (files or folders, all theirs alone)."""

    name: str
    commands: Sequence[Sequence[str]]
    outputs: Sequence[Path]
    inputs: Sequence[Path] = ()

    @property
    def key(self) -> str:
        """Changes with the commands and with the content of the inputs; the interpreter's own path does not count."""
        commands = [[Path(command[0]).name, *command[1:]] for command in self.commands]
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.inputs]
        return hashlib.sha256(json.dumps([commands, contents]).encode()).hexdigest()[:16]


class StageFailed(Exception):
    """A command of a stage ended with an error; it has said why."""

    def __init__(self, stage: str, code: int):
        super().__init__(f"stage {stage!r} failed with exit code {code}")
        self.code = code


class Ledger:
    """The record of finished stages, one JSON file, in the order of the chain."""

    def __init__(self, path: Path):
        self.path = path
        self.finished: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, stage: Stage) -> None:
        """Run a stage, or say that it is reused. One that was killed continues; one whose inputs changed begins anew,
        and so does everything after it.

        Raises:
            StageFailed: with the command's exit code.
        """
        done = self.finished.get(stage.name)
        current = done and done["key"] == stage.key and not done["stale"]
        if done and current and all(path.exists() for path in stage.outputs):
            print(f"▸ {stage.name}: finished earlier in {done['seconds']:.0f} s, reused", flush=True)
            return
        if done:
            self._begin_anew(stage)
        print(f"▸ {stage.name}", flush=True)
        started = time.monotonic()
        with MemoryWatch() as memory:
            for command in stage.commands:
                code = subprocess.run(command, check=False).returncode
                if code:
                    raise StageFailed(stage.name, code)
        seconds = time.monotonic() - started
        record = {"key": stage.key, "seconds": seconds, "peak_gib": memory.peak_gib, "stale": False}
        self.finished[stage.name] = record
        self._save()
        print(f"  {seconds:.0f} s, at most {memory.peak_gib:.1f} GiB", flush=True)

    def _begin_anew(self, stage: Stage) -> None:
        # On disk before anything is removed: a kill from here on must not let later stages pass for current.
        names = list(self.finished)
        for later in names[names.index(stage.name) :]:
            self.finished[later]["stale"] = True
        self._save()
        for path in stage.outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _save(self) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.finished, indent=1) + "\n")
        beside.rename(self.path)
