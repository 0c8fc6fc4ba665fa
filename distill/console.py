"""How a command meets the person at the terminal: one clear error, an exit code, no library chatter."""

import argparse
import atexit
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from distill.errors import EXIT_FAILED, BadInput, Ended
from distill.lifeline import hold

if TYPE_CHECKING:
    from distill.vigil.watch import Vigil

# The launcher kills the other ranks as soon as the one that speaks has left.
_GRACE_SECONDS = 15


def speaks() -> bool:
    """Whether this process is the one of its host that prints errors."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def quiet_libraries() -> None:
    """Keep libraries' notices off the console; their errors stay."""
    # A store that is gone with its rank is thirty lines of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def positive(text: str) -> int:
    """A whole number from 1 up, as argparse's `type`; anything else is its error, with exit code 2."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def natural(text: str) -> int:
    """As `positive`, from 0 up."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def above_0(text: str) -> float:
    """A finite number above 0, likewise."""
    if (number := not_below_0(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def not_below_0(text: str) -> float:
    """A finite number of 0 or more, likewise."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
    return number


def leave(code: int) -> NoReturn:
    """End this process with `code` as soon as its exit handlers have run.

    The interpreter is not taken down: a thread of the process group that lets go of its last tensor meanwhile would
    need the interpreter for it, and abort a rank that has done all its work.
    """
    from distill.vigil.words import flush

    try:
        atexit._run_exitfuncs()
    finally:
        flush()
        os._exit(code)


def tell(error: BadInput) -> None:
    """Print what is wrong, a line for each problem, unless that has been done."""
    for problem in [] if error.told else error.problems:
        with suppress(OSError):
            print(f"distill: {problem}", file=sys.stderr, flush=True)
    error.told = True


def run_on_ranks(command: Callable[[], object]) -> int:
    """Run a command that every rank runs; its exit code: what it returns if that is a number, else 0.

    Bad input is printed once a host, an orderly end once, both without a traceback. A rank ends early if the launch
    that started it is gone, and, where a watch is kept, if another rank ends.
    """
    hold()
    try:
        code = command()
        _close_watch()
    except BadInput as error:
        if speaks() or not _others_end(_GRACE_SECONDS, error.code):
            tell(error)
        _depart(error.code)
        return error.code
    except Ended as end:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                print(f"distill: {end}", file=sys.stderr, flush=True)
        _close_watch()
        return end.code
    except Exception as error:
        watch = _watch()
        if watch is None:
            raise
        return watch.fall(error)
    except (KeyboardInterrupt, SystemExit):
        _depart(EXIT_FAILED)
        raise
    finally:
        if topology := sys.modules.get("distill.topology"):  # else there is no group, and no torch to load for that
            topology.stop()
    return code if isinstance(code, int) else 0


def _watch() -> "Vigil | None":
    watching = sys.modules.get("distill.vigil.watch")
    return watching.kept() if watching else None


def _others_end(seconds: float, code: int) -> bool:
    """Wait for that, to end with `code`; whether it has come to it."""
    if watch := _watch():
        return watch.wait_for_end(seconds, code)
    time.sleep(seconds)
    return False


def _close_watch() -> None:
    if watch := _watch():
        watch.close()


def _depart(code: int) -> None:
    if watch := _watch():
        watch.depart(code)
