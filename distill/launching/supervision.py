"""A launcher in a process of its own, which does not outlive us: pdsh and its ranks would go on without it.

Signals come here first: the ranks are asked, at the place where they have met, to save themselves and stop.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import psutil

from distill.errors import EXIT_FAILED, EXIT_PREEMPTED
from distill.preemption import SIGNALS
from distill.vigil.board import Verdict, call
from distill.vigil.words import flush

# DeepSpeed's launcher gives ranks 30 s before it kills them.
_GRACE_SECONDS = 40
_ASK_SECONDS = 5.0
# Ranks that hear of their end need no signal, which their launcher would send to what serves them, too.
_END_SECONDS = 8.0
# A signal that comes just before a wait without end, or to another thread, is heard only after it.
_LOOK_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_LAUNCH = -1
"""In the place of a rank that has ended the run."""
_HEARD = (signal.SIGINT, *SIGNALS)


class Supervisor:
    """Of one launch, or of several of the same run one after the other. Signals come to it inside of a `with`."""

    def __init__(self) -> None:
        self.told = False
        """Whether someone wants this to end: then it is not started again."""
        self._child: int | None = None
        self._meeting: tuple[str, int] | None = None
        self._preempted = False
        """Whether the first word to stop came from a scheduler, and before there were ranks to hear it."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Before hosts are asked anything: what they were given must go again, however this ends."""
        self._before = {number: signal.signal(number, self._hear) for number in _HEARD}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Give signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def run(self, launch: Callable[[], object], meeting: tuple[str, int] | None = None) -> int:
        """Run `launch`, whose ranks meet at an address and port, and wait for it; its exit code.

        SIGTERM and SIGUSR1 let the ranks save themselves and stop, once; again, or SIGINT, ends them. They end too, on
        Linux, when this process is killed.
        """
        us, self._meeting = os.getpid(), meeting
        # A signal between these lines would find a child that nobody knows yet, or come to it as if it were us.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        if not self.told:
            self._child = os.fork()
            if self._child == 0:
                _be(launch, us)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        if self._child is None:
            return self.code_unstarted()
        status = _wait(self._child)
        self._child = None
        code = max(os.waitstatus_to_exitcode(status), EXIT_FAILED) if status else 0
        return EXIT_PREEMPTED if code == EXIT_FAILED and self._preempted else code

    def code_unstarted(self) -> int:
        """The exit code where this was told to end before there was anything to end."""
        return EXIT_PREEMPTED if self._preempted else EXIT_FAILED

    def rest(self, seconds: float) -> bool:
        """Wait before the next launch; whether it may be."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.told:
            time.sleep(0.1)
        return not self.told

    def _hear(self, number: int, _: FrameType | None) -> None:
        first, self.told = not self.told, True
        asked = first and number != signal.SIGINT
        if asked and self._child is not None and self._ask(None):
            with suppress(OSError):
                print("distill: told to stop; the run saves itself at its next step boundary", file=sys.stderr)
            return
        self._preempted |= asked
        if self._child is None:
            return
        # A signal alone would let ranks go on to their step boundary.
        heard = self._ask(Verdict(EXIT_FAILED, "the launch was told to end", _LAUNCH))
        ending = threading.Timer(_END_SECONDS if heard else 0, self._end, [self._child])
        ending.daemon = True
        ending.start()

    def _end(self, child: int) -> None:
        if child == self._child:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    def _ask(self, verdict: Verdict | None) -> bool:
        """Let the ranks know; whether they could hear it."""
        if self._meeting is None:
            return False
        meeting, heard = self._meeting, []
        # A rank that is frozen would hold this process up.
        asking = threading.Thread(target=lambda: heard.append(call(*meeting, verdict)), daemon=True)
        asking.start()
        asking.join(_ASK_SECONDS)
        return heard == [True]


def _wait(child: int) -> int:
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(_LOOK_SECONDS)


def _be(launch: Callable[[], object], parent: int) -> NoReturn:
    code = EXIT_FAILED
    try:
        _be_launcher(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        code = _code(launch)
    finally:
        os._exit(code)


class _Noted(subprocess.Popen[Any]):
    """A process that can be asked, when DeepSpeed's launcher has come back, how it ended."""

    last: "_Noted | None" = None

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        _Noted.last = self

    def wait(self, timeout: float | None = None) -> int:
        """With an end, however late: then Python looks every now and then, and hears signals."""
        return super().wait(threading.TIMEOUT_MAX if timeout is None else timeout)


def _be_launcher(parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        # DeepSpeed puts its own in this place where it reaches hosts by pdsh.
        signal.signal(number, _end_children)
    # A scheduler may send it to all processes of a job: DeepSpeed's launcher would die of it, before the ranks listen.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)  # it was faster


def _end_children(_: int, __: FrameType | None) -> NoReturn:
    try:
        children = psutil.Process().children()
        for process in children:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(children, timeout=_GRACE_SECONDS)
        flush()
    finally:
        os._exit(EXIT_FAILED)  # an exception would be lost if the signal came in a `__del__`, and the launch go on


def _code(launch: Callable[[], object]) -> int:
    """What `launch` ends with. DeepSpeed's takes a process that a signal has killed for one that has done its work."""
    subprocess.Popen = _Noted  # type: ignore[misc]
    try:
        launch()
        return EXIT_FAILED if _Noted.last is not None and (_Noted.last.returncode or 0) < 0 else 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
        return 1
    finally:
        flush()
