"""Locks that a killed build has left: torch would wait for them for ever, and say nothing.

DeepSpeed has torch build its operators on first use, under a file `lock` that the builder holds open, in a folder where
its ninja works.
"""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

_SETTLED_SECONDS = 5.0
# Elsewhere the builder may be on another host, where nobody here sees it.
_OF_ONE_HOST = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs", "hfs"}


def remove_stale_locks() -> None:
    """Remove the locks of DeepSpeed's builds that no live process of this host holds; every rank may call it at once.

    One on a filesystem that hosts share is named, and left.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    found = Path(given).glob("deepspeed_*/lock") if given else Path(get_default_build_root()).glob("*/deepspeed_*/lock")
    for lock in found:
        _remove_if_stale(lock)


def _remove_if_stale(lock: Path) -> None:
    try:
        about = lock.stat()
        # One that is being made now is not yet to be judged.
        if 0 <= (age := time.time() - about.st_mtime) < _SETTLED_SECONDS:
            time.sleep(_SETTLED_SECONDS - age)
        if about.st_uid != os.getuid() or _held(lock):
            return
        if _filesystem(lock) not in _OF_ONE_HOST:
            said = f"distill: no process here holds the build lock {lock}; remove it if no other host builds there"
            print(said, file=sys.stderr, flush=True)
            return
        # One remover at a time. What it finds unheld stays so: a build begins with a lock of its own, if there is none.
        with _alone_in(lock.parent):
            if not _held(lock) and _same(about, lock.stat()):
                lock.unlink()
                print(f"distill: removed {lock}, left by a build that was killed", file=sys.stderr, flush=True)
    except FileNotFoundError:
        return  # its build is done, or another rank was faster


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _held(lock: Path) -> bool:
    """Whether a process has the lock open, or works in its folder, as a ninja does that has outlived its Python."""
    path = os.path.realpath(lock)
    folder = os.path.dirname(path)
    for process in psutil.process_iter():
        # Processes of others cannot be asked; the lock is ours.
        with suppress(psutil.Error, OSError):
            if process.cwd() == folder or any(file.path == path for file in process.open_files()):
                return True
    return False


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_ino, one.st_dev, one.st_mtime_ns) == (other.st_ino, other.st_dev, other.st_mtime_ns)


def _filesystem(path: Path) -> str | None:
    """The type of the filesystem that holds `path`."""
    where = Path(os.path.realpath(path))
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in where.parents if folder in mounts), None)
