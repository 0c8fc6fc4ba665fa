"""Finding and reading raw files: globs, jsonl, plain text."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import BadInput, Problem


def find_files(patterns: list[str], field: str = "DATA") -> list[Path]:
    """Files that the paths and globs name, sorted, each once.

    Raises:
        BadInput: a pattern that names no file, or an empty file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        if not matches:
            raise BadInput(Problem(field, pattern, "no such file", "give existing files or a glob that matches some"))
        found |= set(matches)
    for path in found:
        if path.stat().st_size == 0:
            raise BadInput(Problem(field, str(path), "the file is empty", "remove it or fill it"))
    return sorted(found)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their 1-based numbers.

    Raises:
        BadInput: not UTF-8.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError:
                raise BadInput(Problem("DATA", f"{path}:{number}", "not UTF-8", "convert the file")) from None
            if line.strip():
                yield number, line


def parse_json(line: str, where: str) -> Any:
    """One line's JSON value.

    Raises:
        BadInput: names `where` (file:line) and the column.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        column = getattr(error, "colno", "?")
        wrong = f"not valid JSON at column {column}"
        raise BadInput(Problem("DATA", where, wrong, "one JSON object a line is needed")) from None
