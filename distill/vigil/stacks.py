"""Where the threads of this process are: for the log of a run that hangs."""

import faulthandler
import sys
import threading
from pathlib import Path

_INNERMOST = 4
_COLLECTIVE = ("/torch/distributed/", "/deepspeed/comm/")


def in_collective() -> bool:
    """Whether the main thread waits for other ranks, as far as Python's frames tell."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    for _ in range(_INNERMOST):
        if frame is None:
            return False
        file = frame.f_code.co_filename
        if any(part in file for part in _COLLECTIVE) or ("/deepspeed/" in file and frame.f_code.co_name == "wait"):
            return True
        frame = frame.f_back
    return False


def show(path: Path, title: str) -> None:
    """All threads' stacks, innermost call first, on stderr and in `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    # In one piece: other ranks write at the same time.
    print(f"\n{title}:\n{path.read_text(encoding='utf-8')}", end="", file=sys.stderr, flush=True)
