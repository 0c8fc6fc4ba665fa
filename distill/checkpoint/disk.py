"""Files and folders that survive a kill: on disk before their name, and a checksum of what went there."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from distill.whereabouts import here

_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    """What a file must hold."""

    bytes: int
    sha256: str


class HashedFile:
    """As much of a binary file as a serialiser needs; knows the checksum of what was written to it."""

    def __init__(self, file: IO[bytes]):
        self._file, self._hash, self._bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None
        """What the system said of the disk; a serialiser may turn it into another."""

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`."""
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        self._bytes += written
        return written

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    @property
    def record(self) -> FileRecord:
        """Of what has been written so far."""
        return FileRecord(self._bytes, self._hash.hexdigest())


def write_file(path: Path, serialise: Callable[[HashedFile], object]) -> FileRecord:
    """Write a file and wait until it is on disk.

    Raises:
        OSError: the system refuses.
    """
    with path.open("wb") as file:
        hashed = HashedFile(file)
        try:
            serialise(hashed)
        except Exception as error:
            raise hashed.error or error from None
        file.flush()
        os.fsync(file.fileno())
    return hashed.record


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file at once, on disk before its name."""
    beside = path.with_suffix(".new")
    write_file(beside, lambda file: file.write(content))
    beside.rename(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file is on disk, whatever wrote it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's names are on disk, where the system can tell."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network filesystems refuse
            os.fsync(opened)
    finally:
        os.close(opened)


def wrong_with(path: Path, record: FileRecord) -> str | None:
    """How `path` differs from what it must hold; None where it does not.

    Raises:
        OSError: it cannot be read now, which says nothing of what it holds.
    """
    if (wrong := wrong_size(path, record)) is not None:
        return wrong
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            found.update(data)
            here.tick()
    return None if found.hexdigest() == record.sha256 else f"{path.name} is not what was written (checksum)"


def wrong_size(path: Path, record: FileRecord) -> str | None:
    """As `wrong_with`, without reading it."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    return None if size == record.bytes else f"{path.name} has {size} of {record.bytes} bytes"
