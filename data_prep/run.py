"""One run of preprocessing: plan the shards, tokenise them, pack plain text, put the folder of records together."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data_prep.files import describe_dataset
from data_prep.packing import Rows, pack_shard, plan_rows
from data_prep.pool import Pool
from data_prep.progress import Progress, hash_of
from data_prep.shards import Shard, count_newlines, cut, cut_inside_a_file, number_lines
from data_prep.tokenize import PROBLEMS_KEPT, UNREADABLE, Job, Summary, tokenize_shard
from distill.data.records import INSTRUCTION_FEATURES, TEXT_FEATURES
from distill.errors import BadInput, Problem


@dataclass
class Throughput:
    """What this run itself tokenised; what it found finished does not count."""

    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    workers: int = 1

    def __str__(self) -> str:
        megabytes, tokens = self.bytes / 1e6 / self.seconds, self.tokens / self.seconds
        size = f"{self.bytes / 1e6:.1f} MB, {self.tokens} tokens in {self.seconds:.1f} s"
        return f"{size} with {self.workers} workers: {megabytes:.2f} MB/s, {tokens:.0f} tokens/s"


class Run:
    """The work of `job` on shards, whose progress is kept in a folder; `skip` leaves out what is bad."""

    def __init__(self, job: Job, progress: Progress, pool: Pool, skip: bool):
        self.job = job
        self.progress = progress
        self.pool = pool
        self.skip = skip
        self.shards: list[Shard] = []
        self.throughput = Throughput(workers=pool.size)
        self._lost: list[Problem] = []

    def plan(self, files: list[Path], size: int) -> None:
        """The shards of an earlier run that did not end, or new ones.

        Raises:
            BadInput: a file cannot be read, unless it is skipped.
        """
        plan = self.progress.plan()
        counted = plan.newlines if plan else {}
        shards = cut(files, size)
        uncounted = [shard for shard in cut_inside_a_file(shards) if shard.number not in counted]
        newlines = counted | dict(self.pool.results(_count_newlines, uncounted))
        self._lost = [found for counts in newlines.values() for found in counts if isinstance(found, Problem)]
        if self._lost and not self.skip:
            raise BadInput(list(dict.fromkeys(self._lost)))
        self.shards = number_lines(shards, newlines)
        if plan is None:
            self.progress.begin_anew(self.shards, newlines)
        else:
            self.progress.resume(plan, self.shards, newlines, self.job.kind)

    def tokenize(self) -> None:
        """Tokenise the shards that are not finished.

        Raises:
            BadInput: bad lines, unless they are skipped; those of the first bad shard are always among them.
        """
        started = time.perf_counter()
        finished = self.progress.finished
        if finished:
            print(f"continues: {len(finished)} of {len(self.shards)} shards are finished", flush=True)
        with tqdm(total=self._bytes(self.shards), unit="B", unit_scale=True, desc="tokenise") as bar:
            bar.update(sum(summary.bytes for summary in finished.values()))
            for summary in self.pool.results(partial(_tokenize, self.job), self._to_do()):
                self.progress.finish(summary)
                self.throughput.bytes += summary.bytes
                self.throughput.tokens += summary.tokens
                self.throughput.seconds = time.perf_counter() - started
                bar.set_postfix_str(f"{self.throughput.tokens / self.throughput.seconds:.0f} tokens/s", refresh=False)
                bar.update(summary.bytes)
        if self._failed():
            raise BadInput([*self.problems(), self._what_to_do()])

    def assemble(self) -> Path:
        """Make the folder of records whole, but for its manifest.

        Raises:
            BadInput: rows of a finished shard were taken away.
        """
        started = time.perf_counter()
        total = len(self.shards)
        files = [self.progress.data_file(number, total) for number in range(total)]
        self.progress.check(self.job.kind, total)
        if self.job.kind == "text":
            tasks = zip(self._rows_to_pack(), files, strict=True)
            for _ in self.pool.results(partial(_pack, self.job.recipe.max_length), tasks):
                pass
        made_from = hash_of(
            [vars(self.job.recipe), self.job.kind, self.job.tokenizer_hash, [one.digest for one in self._summaries()]]
        )
        self.progress.sweep()
        features = INSTRUCTION_FEATURES if self.job.kind == "instructions" else TEXT_FEATURES
        describe_dataset(self.progress.records, [path.name for path in files], features, made_from)
        self.throughput.seconds += time.perf_counter() - started
        return self.progress.records

    def counts(self) -> dict[str, int]:
        """What was read, kept, cut, dropped and skipped."""
        counts: Counter[str] = Counter()
        for summary in self._summaries():
            counts += summary.counts + summary.bad
        if self._lost:
            counts[UNREADABLE] += len(self._lost)
        if self.job.kind == "text":
            length = self.job.recipe.max_length
            counts["tokens read"] = sum(summary.tokens for summary in self._summaries())
            counts["kept"], rest = divmod(counts["tokens read"], length)
            counts["dropped: tokens of the last, incomplete chunk"] = rest
        return {name: count for name, count in sorted(counts.items()) if count}

    def problems(self) -> list[Problem]:
        """The first bad lines, in the order of the input."""
        found = [problem for summary in self._summaries() for problem in summary.problems]
        return list(dict.fromkeys([*self._lost, *found]))[:PROBLEMS_KEPT]

    def worth_keeping(self) -> bool:
        """Some shard is finished that the same command need not do again."""
        return any(not one.unreadable and (self.skip or not one.bad) for one in self.progress.finished.values())

    def _to_do(self) -> Iterator[tuple[Shard, Path]]:
        total = len(self.shards)
        for shard in self.shards:
            if self._failed():
                return
            if shard.number not in self.progress.finished:
                yield shard, self.progress.rows(self.job.kind, shard.number, total)

    def _failed(self) -> bool:
        return not self.skip and any(summary.bad for summary in self.progress.finished.values())

    def _what_to_do(self) -> Problem:
        bad = sum(sum(summary.bad.values()) for summary in self._summaries())
        read = f"{len(self.progress.finished)} of {len(self.shards)} shards read so far"
        wrong = f"bad lines or unreadable pieces of files in the {read}: {bad}"
        kept = ", which goes on from the shards that are finished" if self.worth_keeping() else ""
        return Problem("--on-bad", "fail", wrong, f"mend them, or give skip (ON_BAD=skip) to leave them out{kept}")

    def _rows_to_pack(self) -> list[Rows]:
        total = len(self.shards)
        files = [self.progress.rows("text", number, total) for number in range(total)]
        return plan_rows(files, [summary.tokens for summary in self._summaries()], self.job.recipe.max_length)

    def _summaries(self) -> list[Summary]:
        return [self.progress.finished[number] for number in sorted(self.progress.finished)]

    @staticmethod
    def _bytes(shards: list[Shard]) -> int:
        return sum(shard.bytes for shard in shards)


def _count_newlines(shard: Shard) -> tuple[int, list[int | Problem]]:
    return shard.number, count_newlines(shard)


def _tokenize(job: Job, task: tuple[Shard, Path]) -> Summary:
    return tokenize_shard(job, *task)


def _pack(length: int, task: tuple[Rows, Path]) -> None:
    rows, out = task
    pack_shard(rows, length, out)
