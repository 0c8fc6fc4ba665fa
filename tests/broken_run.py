"""Runs that are broken on purpose: start one, wait until it is somewhere, strike, and see how it ends."""

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_MARK = "DISTILL_BROKEN_RUN"
# What does not end by itself is a fault that is not survived; the launcher's own patience is 30 s.
_PATIENCE = 90.0


@dataclass(frozen=True)
class Ending:
    """How a run came to its end."""

    code: int
    seconds: float
    """From the strike until the last of its processes was gone."""
    orphans: list[str]
    """Commands of processes that outlived the launch."""
    port_free: bool
    text: str
    """All that it has printed."""

    @property
    def told(self) -> list[str]:
        """The lines that are ours, in order."""
        return [line for line in self.text.splitlines() if line.startswith("distill: ")]


class BrokenRun:
    """A launch in a session of its own. Its processes are found by a mark in their environment, wherever they go."""

    def __init__(self, command: Sequence[str], root: Path, environment: Mapping[str, str], log: Path, port: int):
        self.log, self.port, self._mark = log, port, uuid.uuid4().hex
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=root,
                env={**environment, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """All that live, the launch included."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by rank: those that DeepSpeed's launcher has started."""
        found = {}
        for process in self.processes():
            with suppress(psutil.Error):
                parent = process.parent()
                if parent and any(word.startswith("--world_info=") for word in parent.cmdline()):
                    found[int(process.environ()["RANK"])] = process
        return found

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: the run ended first, or it took too long; with what was printed.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text()[-6000:]
            assert time.monotonic() < deadline, self.text()[-6000:]
            time.sleep(0.02)

    def wait_for_step(self, metrics: Path, step: int) -> None:
        """Wait until a step has been logged."""
        self.wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace").replace("\r", "\n")

    @staticmethod
    def now() -> float:
        """On the clock of `strike` and `end`."""
        return time.monotonic()

    def strike(self, process: psutil.Process | None = None, number: int = signal.SIGKILL) -> float:
        """Send a signal to one process, or to the launch; when that was."""
        os.kill(process.pid if process else self.process.pid, number)
        return time.monotonic()

    def end(self, since: float, patience: float = _PATIENCE) -> Ending:
        """Wait until all is over; whatever is left then is ended here."""
        deadline = time.monotonic() + patience
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = self.process.poll()
        # What serves a rank, as wandb's process does, goes when it sees that the rank is gone.
        last, seconds = time.monotonic() + 10, time.monotonic() - since
        while (left := self.processes()) and time.monotonic() < last:
            seconds = time.monotonic() - since
            time.sleep(0.02)
        orphans = [" ".join(process.cmdline())[:200] for process in left]
        free = port_is_free(self.port)
        self.clear()
        return Ending(-1 if ended is None else ended, seconds, orphans, free, self.text())

    def clear(self) -> None:
        """End what is left of it."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()


def port_is_free(port: int) -> bool:
    """Whether the next run could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True
