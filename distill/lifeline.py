"""A rank ends with the launch that started it, however that came to its end.

A killed ssh leaves what it has started on the other host running: ranks that nobody sees, at a port that the next
launch wants.
"""

import os
import select
import shlex
import stat
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

_EVERY_SECONDS = 2.0

STDIN = "DISTILL_STDIN_IS_LAUNCH"
"""Set by our own launch over pdsh: whoever holds the other end of stdin has started this rank."""

COMMAND = "DISTILL_COMMAND"
"""Set by our own launch scripts: what was typed."""


def deepspeed_launcher() -> psutil.Process | None:
    """The process of DeepSpeed's launcher that started this rank and its neighbours; None under any other."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent and any(argument.startswith("--world_info=") for argument in parent.cmdline()):
            return parent
    return None


def typed() -> str | None:
    """The command that started this run, as far as it can be known from here: of our launch, or of `deepspeed`."""
    if COMMAND in os.environ:
        return os.environ[COMMAND]
    with suppress(psutil.Error):
        launcher = deepspeed_launcher()
        runner = launcher.parent() if launcher else None
        words = runner.cmdline() if runner else []
        for index, word in enumerate(words[:3]):
            if os.path.basename(word) == "deepspeed":
                return shlex.join(["deepspeed", *words[index + 1 :]])
    return None


@dataclass(frozen=True)
class Lifeline:
    """What this rank hangs on: DeepSpeed's launcher, what started that, and over ssh the other end of stdin."""

    launcher: psutil.Process
    above: int
    through_ssh: bool

    def is_broken(self, wait: float = 0.0) -> bool:
        """Whether any of it is gone, at the latest after `wait` seconds."""
        # A launcher that is gone is not there to be asked, and a lost connection gives an error in place of an end.
        try:
            if os.getppid() != self.launcher.pid or self.launcher.ppid() != self.above:
                return True
            if not self.through_ssh:
                time.sleep(wait)
                return False
            # pdsh sends nothing, and closes when it ends.
            return bool(select.select([0], [], [], wait)[0]) and not os.read(0, 4096)
        except (psutil.Error, OSError):
            return True


_held: Lifeline | None = None


def hold() -> None:
    """From now on end this process as soon as DeepSpeed's launcher, or what started that, is gone."""
    global _held
    told = os.environ.pop(STDIN, None) is not None
    launcher = deepspeed_launcher()
    if launcher is None:
        return
    with suppress(psutil.Error):
        above = launcher.ppid()
        through_ssh = _is_stream() and (told or (_under_sshd(above) and not _has_ended()))
        _held = Lifeline(launcher, above, through_ssh)
        threading.Thread(target=_watch, args=(_held,), daemon=True).start()


def is_broken() -> bool:
    """Whether this process is about to end because what started it is gone."""
    return _held is not None and _held.is_broken()


def _is_stream() -> bool:
    """Whether stdin can tell of its other end; it may be closed, a file or a terminal."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)


def _under_sshd(above: int) -> bool:
    """Whether a command of ssh is what started the launcher, as under plain `deepspeed`; at most a shell lies between.

    A variable that sshd sets would not say so: jobs of a scheduler inherit it from where they were submitted.
    """
    with suppress(psutil.Error):
        process = psutil.Process(above)
        near = [process, process.parent()]
        return any(one is not None and one.name().startswith("sshd") for one in near)
    return False


def _has_ended() -> bool:
    """Whether stdin is at its end before anything started, as under `ssh -n`: then its end means nothing."""
    try:
        return bool(select.select([0], [], [], 0)[0]) and not os.read(0, 4096)
    except OSError:
        return True


def _watch(lifeline: Lifeline) -> None:
    while not lifeline.is_broken(_EVERY_SECONDS):
        pass
    with suppress(OSError):
        print("distill: what started this rank is gone; it ends", file=sys.stderr, flush=True)
    os._exit(1)
