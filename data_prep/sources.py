"""Finding raw files: paths and globs."""

import glob
from pathlib import Path

from distill.errors import BadInput, Problem

_UNPACK = "unpack it first"
_NO_TEXT = {
    b"\x1f\x8b": ("gzip", _UNPACK),
    b"BZh": ("bzip2", _UNPACK),
    b"\xfd7zXZ": ("xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("zstd", _UNPACK),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"PAR1": ("Parquet", "write it as jsonl first"),
    b"\xff\xfe": ("UTF-16", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it to UTF-8"),
}
_LONGEST_MAGIC = max(map(len, _NO_TEXT))


def find_files(patterns: list[str], field: str = "DATA") -> list[Path]:
    """Files that the paths and globs name, sorted, each once.

    Raises:
        BadInput: a pattern that names no file, an empty file, or one of a packed or binary kind.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        if not matches and Path(pattern).is_dir():
            mend = f"name the files in it, as in '{pattern.rstrip('/')}/*.jsonl'"
            raise BadInput(Problem(field, pattern, "is a folder", mend))
        if not matches:
            raise BadInput(Problem(field, pattern, "no such file", "give existing files or a glob that matches some"))
        found |= set(matches)
    for path in found:
        _check_head(path, field)
    return sorted(found)


def _check_head(path: Path, field: str) -> None:
    """See that a file may well be text; what cannot be read is left to whoever reads all of it."""
    try:
        if path.stat().st_size == 0:
            raise BadInput(Problem(field, str(path), "the file is empty", "remove it or fill it"))
        with path.open("rb") as file:
            head = file.read(_LONGEST_MAGIC)
    except OSError:
        return
    for magic, (kind, mend) in _NO_TEXT.items():
        if head.startswith(magic):
            raise BadInput(Problem(field, str(path), f"is {kind}, no text", mend))
