"""What goes wrong in a rank, by order: at a file operation, or on the way into a phase. The product knows none of it.

An order is a dict: "rank", "how" (kill: this rank by SIGKILL, kill all: every rank, as when a node dies; raise: an
exception; or the name of a signal, as SIGTERM, or of an error of the system, as ENOSPC), and "operation": N with
"folder": the Nth time that the rank changes something in there (and, for errors, "times" often); or "phase" and "step".
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distill.checkpoint.disk import HashedFile
from distill.whereabouts import Whereabouts

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


def prepare(order: dict, rank: int) -> None:
    """Let `order` be carried out when its time has come."""
    if rank != order["rank"]:
        return
    if "phase" in order:
        _at_phase(order)
    else:
        _at_operation(Operations(order))


def strike(how: str) -> None:
    """Kill, raise, or send the signal."""
    if how == "kill all":
        os.killpg(0, signal.SIGKILL)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ZeroDivisionError("broken on purpose")
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        return
    number = getattr(errno, how)
    raise OSError(number, os.strerror(number))


class Operations:
    """Counts what a rank changes in a folder, and strikes at one of the changes."""

    def __init__(self, order: dict):
        self.folder, self.how = order["folder"], order["how"]
        first = order["operation"]
        self.struck = range(first, first + order.get("times", 1))
        self.count = 0
        self._lock = threading.Lock()

    def changed(self) -> None:
        with self._lock:
            self.count += 1
            number = self.count
        if self.how == "count":
            with open("/proc/self/fd/1", "a") as said:
                said.write(f"operation {number}\n")
        elif number in self.struck:
            strike(self.how)

    def is_ours(self, path: Any) -> bool:
        return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(self.folder)


def _at_operation(operations: Operations) -> None:
    def heard(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in _CHANGES) and operations.is_ours(args[0]):
            operations.changed()

    fsync, write = os.fsync, HashedFile.write

    def syncing(file: Any) -> None:
        if operations.is_ours(os.readlink(f"/proc/self/fd/{file}")):
            operations.changed()
        fsync(file)

    def writing(file: HashedFile, data: Any) -> int:
        operations.changed()
        return write(file, data)

    sys.addaudithook(heard)
    os.fsync, HashedFile.write = syncing, writing  # type: ignore[method-assign]


def _at_phase(order: dict) -> None:
    within = Whereabouts.within

    @contextmanager
    def watched(self: Whereabouts, phase: str) -> Iterator[None]:
        with within(self, phase):
            if (phase, self.step) == (order["phase"], order["step"]):
                strike(order["how"])
            yield

    Whereabouts.within = watched  # type: ignore[method-assign]
