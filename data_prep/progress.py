"""The work folder `OUT.partial`: what an interrupted run has finished, for the same command to go on from.

It holds a lock, and in a folder named by a hash of recipe, tokenizer and inputs, where no other run writes:

plan.json        the shards
shards/N.json    what became of shard N; its rows are finished
shards/N.tokens  kind text: its tokens, int32
records/         the folder of records to be
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.files import UNFINISHED, write_text
from data_prep.lock import LOCK
from data_prep.shards import Shard, Span
from data_prep.tokenize import Summary
from distill.errors import BadInput, Problem

_PLAN = "plan.json"


def hash_of(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


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

    def begin_anew(self, shards: list[Shard], resumable: bool) -> None:
        """Drop what runs have left and write the plan, unless another run should make its own."""
        for folder in self.folder.parent.iterdir() if self._alone else [self.folder]:
            if folder.name != LOCK:
                shutil.rmtree(folder, ignore_errors=True)
        self._shards.mkdir(parents=True)
        self.records.mkdir()
        self.begun = True
        if resumable:
            write_text(self.folder / _PLAN, json.dumps({"shards": [asdict(shard) for shard in shards]}))

    def resume(self, kind: str) -> list[Shard] | None:
        """The shards of an earlier run of the same work, its finished ones read; None if there was none."""
        try:
            plan = json.loads((self.folder / _PLAN).read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(plan, dict) or not self.records.is_dir():
            return None
        shards = [Shard(one["number"], tuple(Span(**span) for span in one["spans"])) for one in plan["shards"]]
        for shard in shards:
            found = self._summary(shard.number)
            if found and self._is_whole(found, kind, len(shards)):
                self.finished[shard.number] = found
        return shards

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
            write_text(self._shards / f"{summary.number:05}.json", json.dumps(content))
        self.finished[summary.number] = summary

    def sweep(self) -> None:
        """Remove what killed workers have left half-written among the records."""
        for path in self.records.glob(f"*{UNFINISHED}"):
            path.unlink()

    def _is_whole(self, summary: Summary, kind: str, total: int) -> bool:
        rows = self.rows(kind, summary.number, total)
        return rows.is_file() and rows.stat().st_size == summary.size

    def _summary(self, number: int) -> Summary | None:
        try:
            content = json.loads((self._shards / f"{number:05}.json").read_bytes())
        except (OSError, ValueError):
            return None
        counts, bad = Counter(content.pop("counts")), Counter(content.pop("bad"))
        problems = [Problem(**problem) for problem in content.pop("problems")]
        return Summary(**content, counts=counts, bad=bad, problems=problems)
