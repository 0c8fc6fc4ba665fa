"""Lines of jsonl files, and what is wrong with them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import BadInput, Problem


def read_lines(path: Path, field: str = "DATA") -> Iterator[tuple[int, str]]:
    """Non-blank lines with their 1-based numbers.

    Raises:
        BadInput: not UTF-8, or not to be read.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError:
                    raise BadInput(Problem(field, f"{path}:{number}", "not UTF-8", "convert the file")) from None
                if line.strip():
                    yield number, line
    except OSError as error:
        raise BadInput(unreadable(str(path), error, field)) from None


def parse_json(line: str, where: str, field: str = "DATA") -> Any:
    """One line's JSON value.

    Raises:
        BadInput: it has none, or holds what is no text; names `where` (file:line).
    """
    if line.startswith("\ufeff"):
        raise BadInput(Problem(field, where, "begins with a byte-order mark", "save the file as UTF-8 without one"))
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        column = getattr(error, "colno", "?")
        wrong = f"not valid JSON at column {column}"
        raise BadInput(Problem(field, where, wrong, "one JSON object a line is needed")) from None
    if "\\ud" in line or "\\uD" in line:  # half a pair of them is valid JSON, but no text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadInput(Problem(field, where, "holds half a surrogate pair", "correct the line")) from None
    return value


def unreadable(path: str, error: OSError, field: str = "DATA") -> Problem:
    """What to say of a file whose bytes the file system does not give."""
    wrong = f"cannot be read ({error.strerror or error})"
    return Problem(field, path, wrong, "see that every host can read it, or leave it out")
