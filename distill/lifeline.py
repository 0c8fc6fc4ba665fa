"""A rank ends with the launch that started it, however that came to its end.

A killed ssh leaves what it has started on the other host running: ranks that nobody sees, at a port that the next
launch wants.
"""

import os
import select
import stat
import sys
import threading
import time
from contextlib import suppress

import psutil

_EVERY_SECONDS = 2.0


def deepspeed_launcher() -> psutil.Process | None:
    """The process of DeepSpeed's launcher that started this rank and its neighbours; None under any other."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent and any(argument.startswith("--world_info=") for argument in parent.cmdline()):
            return parent
    return None


def hold() -> None:
    """From now on end this process as soon as DeepSpeed's launcher, or what started that, is gone."""
    launcher = deepspeed_launcher()
    if launcher is not None:
        above = launcher.ppid()
        watch = threading.Thread(target=_watch, args=(launcher, above, _comes_through_ssh(above)), daemon=True)
        watch.start()


def _comes_through_ssh(above: int) -> bool:
    """Whether pdsh is at the other end of stdin. On its own machine DeepSpeed's launcher is started by Python."""
    with suppress(psutil.Error):
        if psutil.Process(above).exe() == psutil.Process().exe():
            return False
    mode = os.fstat(0).st_mode
    return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)


def _watch(launcher: psutil.Process, above: int, through_ssh: bool) -> None:
    while os.getppid() == launcher.pid and launcher.ppid() == above:
        if not through_ssh:
            time.sleep(_EVERY_SECONDS)
        # pdsh sends nothing, and closes when it ends.
        elif select.select([0], [], [], _EVERY_SECONDS)[0] and not os.read(0, 4096):
            break
    with suppress(OSError):
        print("distill: what started this rank is gone; it ends", file=sys.stderr, flush=True)
    os._exit(1)
