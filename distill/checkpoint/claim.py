"""One run at a time in a folder, which all its ranks see."""

import fcntl
import os
import time
from pathlib import Path

from distill.errors import BadInput, Problem
from distill.topology import Topology

_LOCK = ".lock"
# A network filesystem may show a new file late.
_SEEN_SECONDS = 10.0


def claim(folder: Path, topology: Topology) -> None:
    """Hold the run folder until this process ends. Collective.

    Raises:
        BadInput: another run holds it, or a rank does not see what rank 0 writes there.
    """
    problem = _lock(folder) if topology.is_writer else None
    problem = topology.gather_objects(problem)[0]
    if problem is None:
        blind = [rank for rank, sees in enumerate(topology.gather_objects(_sees(folder / _LOCK))) if not sees]
        wrong = f"rank {blind[0] if blind else None} does not see what rank 0 writes there"
        problem = Problem("run.folder", str(folder), wrong, "give a folder that all hosts share") if blind else None
    if problem is not None:
        raise BadInput(problem)


def _lock(folder: Path) -> Problem | None:
    folder.mkdir(parents=True, exist_ok=True)
    # Never closed: the system lets go of it when the process ends, however it ends.
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return Problem(
            "run.folder", str(folder), "another run is at work in it", "wait for it, end it, or name another"
        )
    except OSError:
        pass  # a filesystem without locks
    return None


def _sees(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
