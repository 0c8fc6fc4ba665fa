"""The work of one worker: a shard of raw lines in, one file of tokenised rows and a summary out."""

import hashlib
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.files import in_place_of, row_writer
from data_prep.shards import Line, Shard, read_lines_of
from distill.data.encoder import Encoder, content_hash
from distill.data.jsonl import parse_json
from distill.data.records import INSTRUCTION_FEATURES, WRITTEN_BY_A_MODEL, Kind
from distill.data.templates import Example, Malformed, parse, render_all
from distill.errors import BadInput, Problem
from distill.models.loading import load_tokenizer

_LINES_AT_ONCE = 512
_BYTES_AT_ONCE = 2**20
PROBLEMS_KEPT = 10
"""Of each shard; all are counted."""
UNREADABLE = "skipped: unreadable pieces of files"


@dataclass(frozen=True)
class Recipe:
    """What decides the tokenised form of a record."""

    tokenizer: str
    template: str
    max_prompt: int
    max_length: int


@dataclass(frozen=True)
class Job:
    """What the shards of one run have in common."""

    recipe: Recipe
    kind: Kind
    tokenizer_hash: str
    """`content_hash` of the tokenizer: every host must have the same."""


@dataclass
class Summary:
    """What became of one shard."""

    number: int
    bytes: int
    tokens: int = 0
    """Made from its text, those dropped or cut later too."""
    counts: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    """Lines and pieces of files that were left out."""
    problems: list[Problem] = field(default_factory=list)
    """Why; the first of them."""
    unreadable: bool = False
    """The file system failed: another time it may not."""
    digest: str = ""
    """A hash of the lines read."""
    size: int = 0
    """Bytes of the file written: after a crash of the machine it may be there without its content."""

    def refuse(self, problem: Problem) -> None:
        """Leave out a bad line."""
        self.bad["skipped: bad lines"] += 1
        self._note(problem)

    def lose(self, problem: Problem) -> None:
        """Leave out what cannot be read."""
        self.bad[UNREADABLE] += 1
        self.unreadable = True
        self._note(problem)

    def _note(self, problem: Problem) -> None:
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(problem)


def tokenize_shard(job: Job, shard: Shard, out: Path) -> Summary:
    """Write the shard's rows (kind instructions: Arrow) or its tokens (kind text: int32) to `out`, whole or not at all.

    Raises:
        BadInput: this host's tokenizer is not the one of the run.
    """
    encode = _encoder(job.recipe.tokenizer, job.tokenizer_hash)
    summary = Summary(shard.number, shard.bytes)
    batches = _batches(_texts(shard, summary))
    with in_place_of(out) as partial:
        if job.kind == "instructions":
            with row_writer(partial, INSTRUCTION_FEATURES) as writer:
                for lines in batches:
                    writer.write_batch(_rows(lines, job.recipe, encode, summary, writer.schema))
        else:
            with partial.open("wb") as file:
                for lines in batches:
                    file.write(_tokens(lines, encode, summary).tobytes())
        summary.size = partial.stat().st_size
    return summary


@lru_cache(1)
def _encoder(path: str, expected: str) -> Encoder:
    tokenizer = load_tokenizer(path, "TOKENIZER")
    encoder = Encoder(tokenizer)
    if content_hash(tokenizer) != expected:
        wrong = f"is another tokenizer on {socket.gethostname()}"
        raise BadInput(Problem("TOKENIZER", path, wrong, "give all hosts the same files"))
    return encoder


Text = tuple[Line, str]


def _texts(shard: Shard, summary: Summary) -> Iterator[Text]:
    """The lines that hold something, decoded."""
    digest = hashlib.blake2b(digest_size=16)
    for line in read_lines_of(shard):
        if isinstance(line, Problem):
            summary.lose(line)
            continue
        if line.raw is None:
            summary.refuse(Problem("DATA", line.where, "longer than 64 MiB", "cut it into several lines"))
            continue
        digest.update(line.raw)
        try:
            text = line.raw.decode("utf-8")
        except UnicodeDecodeError:
            summary.refuse(Problem("DATA", line.where, "not UTF-8", "convert the file"))
            continue
        if text.strip():
            yield line, text
    summary.digest = digest.hexdigest()


def _batches(lines: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line[1])
        if len(batch) == _LINES_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _rows(lines: list[Text], recipe: Recipe, encode: Encoder, summary: Summary, schema: pa.Schema) -> pa.RecordBatch:
    """The lines as instruction records; malformed ones are refused."""
    examples = _examples(lines, summary)
    prompts = render_all([example for _, example in examples], recipe.template, encode)
    kept: list[tuple[Example, list[int]]] = []
    for (line, example), prompt in zip(examples, prompts, strict=True):
        if isinstance(prompt, Malformed):
            summary.refuse(Problem("DATA", line.where, str(prompt), "correct the line"))
            continue
        summary.counts["read"] += 1
        summary.tokens += len(prompt)
        if len(prompt) > recipe.max_prompt:
            summary.counts["dropped: prompt longer than MAX_PROMPT"] += 1
        elif example.answered and not example.outputs:
            summary.counts["dropped: empty response"] += 1
        else:
            kept.append((example, prompt))
    responses = _responses([example for example, _ in kept], encode)
    summary.tokens += sum(map(len, responses))
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for (example, prompt), response in zip(kept, responses, strict=True):
        room = recipe.max_length - len(prompt)
        summary.counts["kept"] += 1
        summary.counts["kept: response cut at MAX_LENGTH"] += len(response) > room
        summary.counts["kept: without a response"] += not response
        summary.counts[WRITTEN_BY_A_MODEL] += bool(example.written_by)
        columns["id"].append(example.id)
        columns["prompt"].append(example.messages[-1]["content"])
        columns["references"].append(example.outputs)
        columns["prompt_ids"].append(prompt)
        columns["response_ids"].append(response[:room])
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def _examples(lines: list[Text], summary: Summary) -> list[tuple[Line, Example]]:
    found = []
    for line, text in lines:
        try:
            found.append((line, parse(parse_json(text, line.where), default_id=line.where)))
        except BadInput as error:
            summary.refuse(error.problems[0])
        except Malformed as error:
            summary.refuse(Problem("DATA", line.where, str(error), "correct the line"))
    return found


def _responses(examples: list[Example], encode: Encoder) -> list[list[int]]:
    """Ids of each first response, with EOS if it is complete; none for an example without one."""
    eos = encode.tokenizer.eos_token_id
    found = iter(encode([example.outputs[0] for example in examples if example.outputs]))
    return [next(found) + ([eos] if example.complete else []) if example.outputs else [] for example in examples]


def _tokens(lines: list[Text], encode: Encoder, summary: Summary) -> np.ndarray:
    """All tokens of the lines: a `text` field of jsonl with EOS behind it, or a line of a text file as it is."""
    texts, is_json = [], []
    for line, text in lines:
        is_json.append(line.path.endswith(".jsonl"))
        if not is_json[-1]:
            texts.append(text)
            continue
        try:
            texts.append(_text_field(parse_json(text, line.where)))
        except BadInput as error:
            summary.refuse(error.problems[0])
            is_json.pop()
        except Malformed as error:
            summary.refuse(Problem("DATA", line.where, str(error), "correct the line"))
            is_json.pop()
    end = [encode.tokenizer.eos_token_id]
    pieces = chain.from_iterable((ids, end if ended else ()) for ids, ended in zip(encode(texts), is_json, strict=True))
    found = np.fromiter(chain.from_iterable(pieces), np.int32)
    summary.tokens += len(found)
    return found


def _text_field(record: Any) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise Malformed("needs a 'text' field")
    text: str = record["text"]
    return text
