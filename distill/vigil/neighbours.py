"""Ranks whose processes this one can see: they notice at once when one of them is gone."""

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

_EXIT_CODE = 52
"""Place of a process's wait status in /proc/PID/stat, from 1."""


def place() -> str:
    """What processes share that see each other's ids: the machine as it was booted, and the namespace."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        found.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "-".join(found)


class Neighbours:
    """The other ranks of this place, by rank."""

    def __init__(self, rank: int):
        self._rank = rank
        self._processes: dict[int, psutil.Process | None] = {}

    def __len__(self) -> int:
        return len(self._processes)

    def __contains__(self, rank: int) -> bool:
        return rank in self._processes

    def meet(self, pids: Mapping[int, int]) -> None:
        """Know them all."""
        for rank, pid in pids.items():
            if rank != self._rank and rank not in self._processes:
                try:
                    self._processes[rank] = psutil.Process(pid)
                except psutil.NoSuchProcess:
                    self._processes[rank] = None
                except psutil.Error:
                    continue  # it is there; to be asked again

    def gone(self) -> dict[int, str]:
        """Those whose process has ended, and how as far as it can be told."""
        return {rank: _how(process) for rank, process in self._processes.items() if not _lives(process)}

    def forget(self, rank: int) -> None:
        """It has left in peace."""
        del self._processes[rank]

    def first(self) -> bool:
        """Whether this is the first of the ranks here that live."""
        return all(rank > self._rank or not _lives(process) for rank, process in self._processes.items())

    def kill(self, ranks: tuple[int, ...]) -> None:
        """End those that are here and do not answer."""
        for rank in ranks:
            process = self._processes.get(rank)
            if process is not None:
                with suppress(psutil.Error):
                    process.kill()


def _lives(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it does not let itself be asked


def _signal(number: int) -> str:
    """Its name; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _how(process: psutil.Process | None) -> str:
    # Its launcher has the exit code; a process that waits for it to look can still be asked.
    status = 0
    with suppress(OSError, IndexError, ValueError):
        stat = Path(f"/proc/{process.pid if process else 0}/stat").read_text(encoding="ascii", errors="replace")
        # The name, in parentheses, may hold anything.
        status = int(stat.rpartition(")")[2].split()[_EXIT_CODE - 3])
    if os.WIFSIGNALED(status):
        return f"was killed ({_signal(os.WTERMSIG(status))})"
    return f"ended with exit code {os.WEXITSTATUS(status)}" if status else "was killed, or crashed"
