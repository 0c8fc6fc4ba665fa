"""jsonl files → token ids: prompts with their references, multiple-choice questions, pieces of plain text."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.data.encoder import Encoder
from distill.data.jsonl import parse_json, read_lines
from distill.data.templates import Example, Malformed, parse, render_all
from distill.errors import BadInput, Problem
from distill.evaluation.questions import Question
from distill.evaluation.suite import Suite


@dataclass(frozen=True)
class PromptSet:
    """Prompts to answer, in the order of the file."""

    prompt_ids: list[list[int]]
    prompts: list[str]
    """As a person wrote them, without a template."""
    references: list[list[str]]
    """For each prompt; of a set without any, empty lists."""

    @property
    def questions(self) -> list[Question]:
        """As people read them."""
        return [Question(*row) for row in zip(self.prompts, self.references, strict=True)]

    @property
    def content(self) -> str:
        """Changes with the prompts as the model reads them; not with the references."""
        return _hash(self.prompt_ids)

    @property
    def references_hash(self) -> str:
        """Changes with the references."""
        return _hash(self.references)


@dataclass(frozen=True)
class ChoiceSet:
    """Multiple-choice questions; choice c of question i is row `first[i] + c` of `rows`."""

    rows: list[tuple[list[int], list[int]]]
    """Prompt ids and ids of one choice."""
    first: list[int]
    counts: list[int]
    answers: list[int]


@dataclass(frozen=True)
class TextSet:
    """Plain text cut into pieces; the first id of each, in the prompt's place, is not predicted."""

    rows: list[tuple[list[int], list[int]]]


def read_prompts(name: str, path: Path, suite: Suite, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The set `name` of a suite.

    Raises:
        BadInput: a line that is no such record, a prompt that is too long, or references for some lines only.
    """
    field = f"sets.{name}"
    examples, lines = [], []
    for number, record in _records(path, field):
        examples.append(_parsed(record, path, number, field))
        lines.append(number)
    _check_template(suite, tokenizer)
    prompt_ids = _rendered(examples, lines, path, field, suite, tokenizer)
    unanswered = [number for example, number in zip(examples, lines, strict=True) if not example.outputs]
    if 0 < len(unanswered) < len(lines):
        wrong = f"has no reference, {len(lines) - len(unanswered)} other lines have"
        raise BadInput(Problem(field, f"{path}:{unanswered[0]}", wrong, "give every line an output, or none"))
    texts = ["\n\n".join(turn["content"] for turn in example.messages) for example in examples]
    return PromptSet(prompt_ids, texts, [example.outputs for example in examples])


def read_choices(name: str, path: Path, suite: Suite, tokenizer: PreTrainedTokenizerBase) -> ChoiceSet:
    """The multiple-choice set `name` of a suite.

    Raises:
        BadInput: a line that is no such question, or one that is too long.
    """
    field = f"choices.{name}"
    examples, lines, offered, answers = [], [], [], []
    for number, record in _records(path, field):
        examples.append(_parsed(record, path, number, field))
        choices, answer = _question(record, f"{path}:{number}", field)
        lines.append(number)
        offered.append(choices)
        answers.append(answer)
    _check_template(suite, tokenizer)
    prompt_ids = _rendered(examples, lines, path, field, suite, tokenizer)
    encode = Encoder(tokenizer)
    rows: list[tuple[list[int], list[int]]] = []
    first = []
    for prompt, choices, number in zip(prompt_ids, offered, lines, strict=True):
        first.append(len(rows))
        for text, ids in zip(choices, encode(choices), strict=True):
            if not ids:
                raise BadInput(Problem(field, f"{path}:{number}", f"{text!r} has no token", "give it another text"))
            rows.append((prompt, ids))
    return ChoiceSet(rows, first, list(map(len, offered)), answers)


def read_text(name: str, path: Path, suite: Suite, tokenizer: PreTrainedTokenizerBase) -> TextSet:
    """The plain text `name` of a suite, in pieces of `context` tokens; each begins with BOS where there is one.

    Raises:
        BadInput: it cannot be read, or holds no text.
    """
    field = f"texts.{name}"
    if path.suffix == ".jsonl":
        documents = [_text_of(record, f"{path}:{number}", field) for number, record in _records(path, field)]
    else:
        documents = ["".join(line for _, line in read_lines(_there(path, field), field))]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = suite.context - len(bos)
    pieces = []
    for ids in Encoder(tokenizer)(documents):
        # A piece of one token would have nothing to predict it from.
        pieces += [bos + ids[start : start + room] for start in range(0, len(ids), room) if len(ids) - start > 1 or bos]
    if not pieces:
        raise BadInput(Problem(field, str(path), "holds no text", "give it some, or take it out"))
    return TextSet([(ids[:1], ids[1:]) for ids in pieces])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _there(path: Path, field: str) -> Path:
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "no such file"
        raise BadInput(Problem(field, str(path), wrong, "give the path of a file"))
    return path


def _records(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    count = 0
    for count, (number, line) in enumerate(read_lines(_there(path, field), field), 1):  # noqa: B007
        yield number, parse_json(line, f"{path}:{number}", field)
    if not count:
        raise BadInput(Problem(field, str(path), "holds no lines", "give one JSON object a line"))


def _parsed(record: Any, path: Path, number: int, field: str) -> Example:
    try:
        return parse(record, str(number))
    except Malformed as error:
        raise BadInput(Problem(field, f"{path}:{number}", str(error), "correct the line")) from None


def _check_template(suite: Suite, tokenizer: PreTrainedTokenizerBase) -> None:
    if suite.template == "chat" and not tokenizer.chat_template:
        raise BadInput(Problem("template", "chat", "this tokenizer has no chat template", "use alpaca or plain"))


def _rendered(
    examples: list[Example],
    lines: list[int],
    path: Path,
    field: str,
    suite: Suite,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    found = []
    for number, ids in zip(lines, render_all(examples, suite.template, Encoder(tokenizer)), strict=True):
        where = f"{path}:{number}"
        if isinstance(ids, Malformed):
            raise BadInput(Problem(field, where, str(ids), "correct the line"))
        if len(ids) > suite.max_prompt:
            raise BadInput(Problem(field, where, f"{len(ids)} prompt tokens", "raise max_prompt, or drop the line"))
        if not ids:
            raise BadInput(Problem(field, where, "its prompt has no token", "use a template, or drop the line"))
        found.append(ids)
    return found


def _question(record: dict[str, Any], where: str, field: str) -> tuple[list[str], int]:
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) for text in choices):
        raise BadInput(Problem(field, where, "'choices' must be a list of two texts or more", "correct the line"))
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        wrong = f"'answer' must be the place of a choice, 0 to {len(choices) - 1}"
        raise BadInput(Problem(field, where, wrong, "correct the line"))
    return choices, answer


def _text_of(record: Any, where: str, field: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise BadInput(Problem(field, where, "needs a 'text'", "correct the line"))
    text: str = record["text"]
    return text
