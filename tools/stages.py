"""A chain of commands that remembers what is finished, how long it took and how much memory it needed."""

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
        self._changing = threading.Lock()
        self._together: set[str] = set()

    def run_together(self, stages: Sequence[Stage], jobs: int) -> None:
        """Run stages that do not need each other, `jobs` at a time, each with its share of the cores.

        What they print goes into files beside the ledger, in logs/. All that have begun end before an error is raised.

        Raises:
            StageFailed: of the first that failed; no other is begun after it.
        """
        if jobs == 1 or len(stages) == 1:
            for stage in stages:
                self.run(stage)
            return
        self._together = {stage.name for stage in stages}
        threads = str(max((os.cpu_count() or 1) // jobs, 1))
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        with ThreadPoolExecutor(jobs) as pool:
            running = [pool.submit(self.run, stage, self._log(stage), environment) for stage in stages]
            try:
                for one in running:
                    one.result()
            except StageFailed:
                pool.shutdown(cancel_futures=True)
                raise

    def _log(self, stage: Stage) -> Path:
        return self.path.parent / "logs" / f"{stage.name.replace('/', '-')}.log"

    def run(self, stage: Stage, log: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Run a stage, or say that it is reused. One that was killed continues; one whose inputs changed begins anew,
        and so does everything after it. What it prints goes to the console, or is added to `log`.

        Raises:
            StageFailed: with the command's exit code.
        """
        done = self.finished.get(stage.name)
        current = done and done["key"] == stage.key and not done["stale"]
        if done and current and all(path.exists() for path in stage.outputs):
            print(f"▸ {stage.name}: finished earlier in {done['seconds']:.0f} s, reused", flush=True)
            return
        if done and done.get("begun") != stage.key:
            self._begin_anew(stage)
        print(f"▸ {stage.name}" + (f" ({log})" if log else ""), flush=True)
        started, peak = time.monotonic(), 0.0
        for command in stage.commands:
            peak = max(peak, _run(stage.name, command, log, environment))
        seconds = time.monotonic() - started
        with self._changing:
            self.finished[stage.name] = {"key": stage.key, "seconds": seconds, "peak_gib": peak, "stale": False}
            self._save()
        print(f"  {stage.name}: {seconds:.0f} s, at most {peak:.1f} GiB", flush=True)

    def _begin_anew(self, stage: Stage) -> None:
        # On disk before anything is removed: a kill from here on must not let later stages pass for current.
        with self._changing:
            names = list(self.finished)
            for later in names[names.index(stage.name) :]:
                if later == stage.name or later not in self._together:
                    self.finished[later] |= {"stale": True, "begun": None}
            self._save()
        for path in stage.outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        with self._changing:
            self.finished[stage.name]["begun"] = stage.key  # from here on a kill loses nothing
            self._save()

    def _save(self) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.finished, indent=1) + "\n")
        beside.rename(self.path)


def _run(stage: str, command: Sequence[str], log: Path | None, environment: Mapping[str, str] | None) -> float:
    """The command's largest memory, in GiB."""
    with ExitStack() as stack:
        output: Any = None
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(log.open("ab"))
        process = stack.enter_context(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        with MemoryWatch(process.pid) as memory:
            code = process.wait()
    if code:
        raise StageFailed(stage, code)
    return memory.peak_gib
