"""A launcher in a process of its own, which does not outlive us: pdsh and its ranks would go on without it."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import psutil

# DeepSpeed's launcher gives ranks 30 s before it kills them.
_GRACE_SECONDS = 40
_PR_SET_PDEATHSIG = 1


def supervise(launch: Callable[[], object]) -> int:
    """Run `launch` and wait for it; its exit code. Being told to end ends it, being killed too (on Linux)."""
    us = os.getpid()
    child = os.fork()
    if child == 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            # DeepSpeed puts its own in this place where it reaches hosts by pdsh.
            signal.signal(number, _end_children)
        _end_with(us)
        os._exit(_code(launch))

    def pass_on(_: int, __: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    _, status = os.waitpid(child, 0)
    return max(os.waitstatus_to_exitcode(status), 1) if status else 0


def _end_children(_: int, __: FrameType | None) -> NoReturn:
    children = psutil.Process().children()
    for process in children:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(children, timeout=_GRACE_SECONDS)
    sys.exit(1)


def _end_with(parent: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)  # it was faster


def _code(launch: Callable[[], object]) -> int:
    try:
        launch()
        return 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
