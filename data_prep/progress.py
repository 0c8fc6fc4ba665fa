"""The work folder `OUT.partial`: what an interrupted run has finished, for the same command to go on from.

It holds a lock, and in a folder named by a hash of recipe, tokenizer and inputs, where no other run writes:

plan.json        the shards, and the newlines counted in them
shards/N.json    what became of shard N; its rows are finished
shards/N.tokens  kind text: its tokens, int32
records/         the folder of records to be
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.files import UNFINISHED, write_text
from data_prep.lock import LOCK
from data_prep.shards import Shard, Span
from data_prep.tokenize import Summary
from distill.errors import BadInput, Problem

_PLAN = "plan.json"

Newlines = dict[int, list[int | Problem]]
"""Of each piece of so numbered shards, or why they could not be counted."""


def hash_of(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """How a run has cut its inputs."""

    shards: list[Shard]
    """Without the pieces of files that it could not count."""
    newlines: Newlines


class Progress:
    """What is finished of a run whose recipe and inputs have the hash `key`; `alone`: no other works in `partial`."""

    def __init__(self, partial: Path, key: str, alone: bool):
        self.folder = partial / key
        self.records = self.folder / "records"
        self._shards = self.folder / "shards"
        self._alone = alone
        self.finished: dict[int, Summary] = {}
        self.begun = False
        """What lies there was made by this run alone."""

    def plan(self) -> Plan | None:
        """Of an earlier run of the same work, with the newlines of the shards that it could count; None if none was."""
        try:
            content = json.loads((self.folder / _PLAN).read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or not self.records.is_dir():
            return None
        shards = [Shard(one["number"], tuple(Span(**span) for span in one["spans"])) for one in content["shards"]]
        return Plan(shards, {int(number): counts for number, counts in content["newlines"].items()})

    def begin_anew(self, shards: list[Shard], newlines: Newlines) -> None:
        """Drop what runs have left and write the plan."""
        for folder in self.folder.parent.iterdir() if self._alone else [self.folder]:
            if folder.name != LOCK:
                shutil.rmtree(folder, ignore_errors=True)
        self._shards.mkdir(parents=True)
        self.records.mkdir()
        self.begun = True
        self._write_plan(shards, newlines)

    def resume(self, earlier: Plan, shards: list[Shard], newlines: Newlines, kind: str) -> None:
        """Read the finished ones of the shards; one that meanwhile can be read in more pieces, or in fewer, is not."""
        for shard, before in zip(shards, earlier.shards, strict=True):
            found = self._summary(shard.number)
            if shard != before:
                self._note(shard.number).unlink(missing_ok=True)
            elif found and self._is_whole(found, kind, len(shards)):
                self.finished[shard.number] = found
        if shards != earlier.shards:
            self._write_plan(shards, newlines)

    def check(self, kind: str, total: int) -> None:
        """See that the rows of every finished shard still lie there.

        Raises:
            BadInput: some do not, because the folder was changed from outside.
        """
        for number, summary in sorted(self.finished.items()):
            if not self._is_whole(summary, kind, total):
                wrong = f"{self.rows(kind, number, total).name} is gone or not the one that this run wrote"
                mend = "run again, and let no other run or clean-up into that folder"
                raise BadInput(Problem("OUT", str(self.folder), wrong, mend))

    def remove(self) -> None:
        """End this work: nothing goes on from it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def rows(self, kind: str, number: int, total: int) -> Path:
        """Where tokenising leaves a shard."""
        return self.data_file(number, total) if kind == "instructions" else self._shards / f"{number:05}.tokens"

    def data_file(self, number: int, total: int) -> Path:
        """Where a shard's rows lie in the end, under the name that `datasets` gives such a file."""
        return self.records / f"data-{number:05}-of-{total:05}.arrow"

    def finish(self, summary: Summary) -> None:
        """Note a shard whose rows lie in their place, unless another attempt may read more of it."""
        if not summary.unreadable:
            content = vars(summary) | {"problems": [vars(problem) for problem in summary.problems]}
            write_text(self._note(summary.number), json.dumps(content))
        self.finished[summary.number] = summary

    def sweep(self) -> None:
        """Remove what killed workers have left half-written among the records."""
        for path in self.records.glob(f"*{UNFINISHED}"):
            path.unlink()

    def _is_whole(self, summary: Summary, kind: str, total: int) -> bool:
        rows = self.rows(kind, summary.number, total)
        return rows.is_file() and rows.stat().st_size == summary.size

    def _write_plan(self, shards: list[Shard], newlines: Newlines) -> None:
        counted = {
            number: found for number, found in newlines.items() if not any(isinstance(n, Problem) for n in found)
        }
        content = {"shards": [asdict(shard) for shard in shards], "newlines": counted}
        write_text(self.folder / _PLAN, json.dumps(content))

    def _note(self, number: int) -> Path:
        return self._shards / f"{number:05}.json"

    def _summary(self, number: int) -> Summary | None:
        try:
            content = json.loads(self._note(number).read_bytes())
        except (OSError, ValueError):
            return None
        counts, bad = Counter(content.pop("counts")), Counter(content.pop("bad"))
        problems = [Problem(**problem) for problem in content.pop("problems")]
        return Summary(**content, counts=counts, bad=bad, problems=problems)
