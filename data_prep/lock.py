"""One run at a time in a folder, also with runs on other hosts that share its file system."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from distill.errors import BadInput, Problem

LOCK = "lock"


@contextmanager
def alone_in(folder: Path, out: Path) -> Iterator[bool]:
    """Hold `folder`, the work folder of `out`, which is made, and removed with the folders made for it if nothing else
    is left in them.

    The lock ends with this process, however that ends. False: the file system knows no locks.

    Raises:
        BadInput: another run holds it, or it cannot be made.
    """
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    file, locked = _take(folder, out)
    try:
        yield locked
    finally:
        with suppress(FileNotFoundError):
            if [path.name for path in folder.iterdir()] == [LOCK] and _is_at(folder / LOCK, file):
                (folder / LOCK).unlink()
        file.close()  # before the folder goes: NFS keeps a file that is open under another name
        for path in (folder, *made):
            with suppress(OSError):  # not empty
                path.rmdir()


def _take(folder: Path, out: Path) -> tuple[TextIO, bool]:
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            wrong = f"cannot be made ({error.strerror or error})"
            raise BadInput(Problem("OUT", str(out), wrong, "name a folder where you may write")) from None
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # a run that ended removed the folder just now
            continue
        except OSError as error:
            wrong = f"{folder} cannot be written to ({error.strerror or error})"
            raise BadInput(Problem("OUT", str(out), wrong, "name a folder where you may write")) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            wrong = f"another run is at work on it ({file.read().strip() or 'just started'})"
            file.close()
            raise BadInput(Problem("OUT", str(out), wrong, "wait for it, end it, or name another folder")) from None
        except OSError as error:
            said = f"{folder} cannot be locked ({error.strerror or error})"
            print(f"preprocess: {said}: start no second run with the same OUT", file=sys.stderr)
            return file, False
        if _is_at(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file, True
        file.close()  # the run that held it has ended and removed it


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
