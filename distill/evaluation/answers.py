"""A model's responses to a set, one jsonl file a seed; a run that was killed goes on where it was.

Rows are decoded in batches that depend on the set alone, whole or not at all: neither the number of ranks nor a restart
changes who is decoded beside whom, and so what rounding makes of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.checkpoint.disk import replace_file
from distill.data.loading import token_batch
from distill.errors import BadInput, Problem
from distill.evaluation.prompt_sets import PromptSet
from distill.rollout.worker import RolloutWorker
from distill.telemetry import progress
from distill.topology import Topology


@dataclass(frozen=True)
class Answer:
    """One sampled response."""

    row: int
    """Place of its prompt in the set, from 0."""
    text: str
    ids: list[int]
    """EOS included, where it ended."""
    ended: bool
    """By itself, rather than at the length limit."""


class AnswerFile:
    """The responses of one model to one set with one seed. `origin`, the first line, is what they depend on."""

    def __init__(self, path: Path, origin: Mapping[str, Any], rows: int):
        self.path, self.origin, self.rows = path, dict(origin), rows

    def read(self) -> dict[int, Answer]:
        """What is there by row, whole lines only, of all ranks that wrote.

        Raises:
            BadInput: the file holds responses of another model or to other questions.
        """
        found: dict[int, Answer] = {}
        for path in (self.path, *self._parts()):
            for answer in self._read(path):
                found[answer.row] = answer
        return found

    def complete(self) -> list[Answer] | None:
        """All responses in the set's order, or None while some are missing."""
        found = self.read()
        return [found[row] for row in range(self.rows)] if len(found) == self.rows else None

    def agreed_complete(self, topology: Topology) -> bool:
        """Whether every rank sees all rows. Collective."""
        return topology.max_over_ranks(float(self.complete() is None)) == 0

    def append(self, rank: int, answers: list[Answer]) -> None:
        """Add one decoded batch to this rank's part."""
        path = self._part(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [] if path.exists() and path.stat().st_size else [self.origin]
        lines += [asdict(answer) for answer in answers]
        with path.open("ab") as file:
            file.write(b"".join(_line(line) for line in lines))

    def merge(self) -> None:
        """One file in the set's order, whole or not at all; the ranks' parts go. For one rank."""
        answers = self.complete()
        assert answers is not None, f"{self.path}: a row was lost"
        replace_file(self.path, b"".join(_line(line) for line in (self.origin, *map(asdict, answers))))
        for part in self._parts():
            part.unlink()

    def trim(self, rank: int) -> None:
        """Before appending: drop the end of a line that a kill has cut off."""
        path = self._part(rank)
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                replace_file(path, whole)

    def _part(self, rank: int) -> Path:
        return self.path.with_suffix(f".rank-{rank}.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank-*.jsonl"))

    def _read(self, path: Path) -> Iterator[Answer]:
        if not path.exists():
            return
        first, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
        if not first:
            return
        origin = _parsed(first)
        if origin != self.origin:
            keys = origin.keys() | self.origin.keys() if isinstance(origin, dict) else set()
            parts = sorted(key for key in keys if origin.get(key) != self.origin.get(key))
            wrong = f"holds responses made otherwise ({', '.join(parts) or 'of another kind'})"
            raise BadInput(Problem("--out", str(path), wrong, "give another folder, or remove the file"))
        for line in lines:
            record = _parsed(line)
            try:
                yield Answer(record["row"], record["text"], record["ids"], record["ended"])
            except (TypeError, LookupError):
                raise BadInput(Problem("--out", str(path), "holds a broken line", "remove the file")) from None


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def batches(prompts: PromptSet, size: int) -> list[list[int]]:
    """The rows that are decoded together: of like length, the longest first, so that ranks end together."""
    order = sorted(range(len(prompts.prompt_ids)), key=lambda row: -len(prompts.prompt_ids[row]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def answer(
    worker: RolloutWorker,
    prompts: PromptSet,
    file: AnswerFile,
    tokenizer: PreTrainedTokenizerBase,
    topology: Topology,
    what: str,
) -> None:
    """Fill `file` with what it lacks. Collective.

    Raises:
        BadInput: the file holds responses of another model or to other questions.
    """
    have = file.read().keys()
    missing = [batch for batch in batches(prompts, worker.settings.batch) if not have >= set(batch)]
    # The first rank's view: a filesystem may show another one less.
    missing = topology.gather_objects(missing)[0]
    rounds = -(-len(missing) // topology.dp_size)
    file.trim(topology.rank)
    with progress(sum(map(len, missing)), what, topology.is_writer) as bar, worker.opened() as sample:
        for turn in range(rounds):
            place = turn * topology.dp_size + topology.dp_rank
            # A rank without a batch of its own decodes the first with the others, which collective forwards ask for.
            rows = missing[place if place < len(missing) else 0]
            batch = token_batch([{"prompt_ids": prompts.prompt_ids[row], "response_ids": []} for row in rows])
            rollouts = sample(batch, torch.tensor(rows), 0)
            if place < len(missing):
                ids = [
                    row[:n]
                    for row, n in zip(rollouts.response_ids.tolist(), rollouts.response_lengths.tolist(), strict=True)
                ]
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                ended = rollouts.ended.tolist()
                file.append(topology.rank, [Answer(*one) for one in zip(rows, texts, ids, ended, strict=True)])
            bar.update(sum(len(batch) for batch in missing[turn * topology.dp_size : (turn + 1) * topology.dp_size]))
    topology.barrier()
    if topology.is_writer:
        file.merge()
    topology.barrier()
