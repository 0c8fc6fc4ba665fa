"""The work of one worker process: a chunk of raw lines in, tokenised rows and counts out."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_prep.sources import parse_json
from data_prep.templates import Malformed, parse, render
from distill.data.records import WRITTEN_BY_A_MODEL
from distill.errors import BadInput, Problem
from distill.models.loading import load_tokenizer

Line = tuple[str, int, str]
"""File, line number, text."""


@dataclass(frozen=True)
class Recipe:
    """What decides the tokenised form of a record."""

    tokenizer: str
    template: str
    max_prompt: int
    max_length: int


@dataclass(frozen=True)
class Chunk:
    """Rows in input order, and counts by what happened to each record."""

    rows: list[dict[str, Any]]
    counts: Counter[str]


_worker: tuple[Recipe, PreTrainedTokenizerBase] | None = None


def start_worker(recipe: Recipe) -> None:
    """Load the tokenizer once a process."""
    global _worker
    _worker = recipe, load_tokenizer(recipe.tokenizer, "TOKENIZER")


def tokenize_instructions(lines: list[Line]) -> Chunk:
    """Tokenise instruction records.

    Raises:
        BadInput: every malformed line of the chunk, by file and number.
    """
    assert _worker is not None
    recipe, tokenizer = _worker
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    for file, number, line in lines:
        where = f"{file}:{number}"
        try:
            example = parse(parse_json(line, where), default_id=where)
            prompt_ids = render(example, recipe.template, tokenizer)
        except BadInput as error:
            problems += error.problems
            continue
        except Malformed as error:
            problems.append(Problem("DATA", where, str(error), "correct the line"))
            continue
        counts["read"] += 1
        if len(prompt_ids) > recipe.max_prompt:
            counts["dropped: prompt longer than MAX_PROMPT"] += 1
            continue
        if example.answered and not example.outputs:
            counts["dropped: empty response"] += 1
            continue
        response_ids = _response(example.outputs, example.complete, tokenizer)
        room = recipe.max_length - len(prompt_ids)
        counts["kept"] += 1
        counts["kept: response cut at MAX_LENGTH"] += len(response_ids) > room
        counts["kept: without a response"] += not response_ids
        counts[WRITTEN_BY_A_MODEL] += bool(example.written_by)
        rows.append(
            {
                "id": example.id,
                "prompt": example.messages[-1]["content"],
                "references": example.outputs,
                "prompt_ids": prompt_ids,
                "response_ids": response_ids[:room],
            }
        )
    if problems:
        raise BadInput(problems)
    return Chunk(rows, counts)


def _response(outputs: list[str], complete: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not outputs:
        return []
    ids = tokenizer.encode(outputs[0], add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id] if complete else ids


def tokenize_text(lines: list[Line]) -> list[list[int]]:
    """Token ids of each piece of plain text: a `text` field of jsonl with EOS behind it, or a line of a text file.

    Raises:
        BadInput: malformed jsonl lines.
    """
    assert _worker is not None
    _, tokenizer = _worker
    pieces = []
    for file, number, line in lines:
        if not file.endswith(".jsonl"):
            pieces.append(tokenizer.encode(line, add_special_tokens=False))
            continue
        record = parse_json(line, f"{file}:{number}")
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise BadInput(Problem("DATA", f"{file}:{number}", "needs a 'text' field", "correct the line"))
        pieces.append([*tokenizer.encode(record["text"], add_special_tokens=False), tokenizer.eos_token_id])
    return pieces
