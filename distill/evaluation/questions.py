"""A set as people read it, beside the responses to it: who reads those needs neither the set's file nor a tokenizer."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.checkpoint.disk import replace_file


@dataclass(frozen=True)
class Question:
    """One row of a set."""

    prompt: str
    """Without a template."""
    references: list[str]


def questions_file(out: Path, name: str) -> Path:
    """Of the set `name` in the folder of an evaluation."""
    return out / "questions" / f"{name}.jsonl"


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """In the set's order, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, b"".join(json.dumps(asdict(one), ensure_ascii=False).encode() + b"\n" for one in questions))


def read_questions(path: Path) -> list[Question]:
    """What `write_questions` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [Question(**json.loads(line)) for line in lines]
    except TypeError as error:
        raise ValueError(str(error)) from None
