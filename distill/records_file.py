"""A file of JSON lines that outlives kills and full disks."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.checkpoint.disk import replace_file, sync_file


class Records:
    """Appends records of steps. What the disk does not take is kept, and tried again with the next."""

    def __init__(self, path: Path, start_step: int):
        """Drop records past `start_step`: a resumed run writes them again."""
        self.path = path
        self._unwritten: list[bytes] = []
        self._size = 0
        """Bytes of whole lines in the file."""
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= start_step]
            replace_file(path, b"".join(kept))
            self._size = sum(map(len, kept))

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; `record["step"]` is its step."""
        told = bool(self._unwritten)
        self._unwritten.append(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if not told:
                tqdm.write(f"distill: {self.path.name} waits for the disk: {error}")

    def _write(self) -> None:
        if not self._unwritten:
            return
        with self.path.open("ab") as file:
            # A full disk may have taken part of a line.
            file.truncate(self._size)
            file.writelines(self._unwritten)
        self._size += sum(map(len, self._unwritten))
        self._unwritten = []

    def flush(self) -> None:
        """Write what still waits, and wait until all is on disk.

        Raises:
            OSError: the disk refuses.
        """
        self._write()
        if self.path.exists():
            sync_file(self.path)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill
