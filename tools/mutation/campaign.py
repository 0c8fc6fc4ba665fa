"""Tries mutants, some at a time, and keeps what came of each: a second call goes on where the first was ended."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.mutation.copies import Copy, source_files
from tools.mutation.entries import Mutant, file_of
from tools.mutation.trials import Outcome, Trial

# With a mistake a target may take a few times as long as without; where that is not known so long, and without so long.
_SLOWER = 5.0
_LONGEST_TRUSTED, _LONGEST = 120.0, 900.0
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Result:
    """Result of one mutant, or of one target without a mistake."""

    key: str
    """Changes with all that it depends on."""
    name: str
    """The mutant's id, or the target."""
    outcome: str
    """`killed`, `survived` or `error`; of a target `passed` or `error`."""
    by: str = ""
    """The test that failed, or what the error is."""
    seconds: float = 0.0


class Ledger:
    """The results so far, one JSON object a line."""

    def __init__(self, path: Path, fresh: bool):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self._known: dict[str, Result] = {}
        for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
            result = Result(**json.loads(line))
            self._known[result.key] = result

    def find(self, key: str) -> Result | None:
        """Look a result up. Errors may pass, so they are tried again."""
        found = self._known.get(key)
        return found if found and found.outcome != "error" else None

    def add(self, result: Result) -> None:
        """Keep a result."""
        self._known[result.key] = result
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.__dict__, ensure_ascii=False) + "\n")


@dataclass
class _Job:
    """Targets to run one after the other, with a mistake or without."""

    name: str
    key: str
    targets: list[str]
    mutant: Mutant | None = None
    error: str = ""
    seconds: float = 0.0


@dataclass
class _Worker:
    copy: Copy
    job: _Job | None = None
    trial: Trial | None = None


@dataclass
class Campaign:
    """Trial of some mutants by several workers; `say` is given a line for each result."""

    project: Path
    ledger: Ledger
    jobs: int
    trusted: bool
    """Whether the tests are known to pass, so that they are not run without a mistake first."""
    say: Callable[[str], object]
    grace: float
    """Seconds that a target with a mistake may take, beyond a few times as many as without."""
    deadline: float = float("inf")
    """Nothing is begun later, by `time.monotonic()`."""
    targets: dict[str, Result] = field(default_factory=dict)
    mutants: dict[str, Result] = field(default_factory=dict)
    workers: list[_Worker] = field(default_factory=list)

    def run(self, mutants: Sequence[Mutant]) -> None:
        """Try them all, and keep each result in `targets` and `mutants`."""
        folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        try:
            names = source_files(self.project)
            count = min(self.jobs, max(len(mutants), 1))
            self.workers = [_Worker(Copy(self.project, names, folder / str(number))) for number in range(count)]
            if not self.trusted:
                tree = self.workers[0].copy.tree
                targets = dict.fromkeys(target for mutant in mutants for target in mutant.tests)
                jobs = [_Job(target, _hash("target", target, tree), [target]) for target in targets]
                self._run(jobs, self.targets)
            self._run([self._job(mutant) for mutant in mutants], self.mutants)
        finally:
            for worker in self.workers:
                if worker.trial is not None:
                    worker.trial.stop()
            shutil.rmtree(folder, ignore_errors=True)

    def _job(self, mutant: Mutant) -> _Job:
        digests = self.workers[0].copy.digests
        tests = [digests.get(file_of(target)) for target in mutant.tests]
        key = _hash(mutant.file, mutant.find, mutant.replace, mutant.tests, digests.get(mutant.file), tests)
        # What a target does that fails anyway says nothing; what the others see counts.
        broken = [target for target in mutant.tests if self._is_broken(target)]
        good = [target for target in mutant.tests if target not in broken]
        error = f"fails without a mistake: {', '.join(broken)}" if broken else ""
        return _Job(mutant.id, key, good, mutant, error)

    def _is_broken(self, target: str) -> bool:
        return target in self.targets and self.targets[target].outcome == "error"

    def _run(self, jobs: Sequence[_Job], results: dict[str, Result]) -> None:
        waiting = []
        for job in jobs:
            if found := self.ledger.find(job.key):
                results[job.name] = found
            else:
                waiting.append(job)
        if len(waiting) < len(jobs):
            self.say(f"{len(jobs) - len(waiting)} of {len(jobs)} are known from an earlier call")
        waiting.reverse()
        while True:
            for worker in self.workers:
                if worker.job is None and waiting and time.monotonic() < self.deadline:
                    self._begin(worker, waiting.pop(), results)
                elif worker.trial is not None and (outcome := worker.trial.poll()):
                    self._take(worker, outcome, results)
            if all(worker.job is None for worker in self.workers) and (
                not waiting or time.monotonic() >= self.deadline
            ):
                return
            time.sleep(_LOOK_SECONDS)

    def _begin(self, worker: _Worker, job: _Job, results: dict[str, Result]) -> None:
        worker.job = job
        if not job.targets:
            self._finish(worker, "error", job.error, results)
            return
        if job.mutant is not None:
            worker.copy.mutate(job.mutant)
        self._start(worker, job)

    def _start(self, worker: _Worker, job: _Job) -> None:
        target = job.targets.pop(0)
        known = self.targets.get(target)
        longest = _LONGEST_TRUSTED if self.trusted else _LONGEST
        limit = known.seconds * _SLOWER + self.grace if known else longest
        worker.trial = Trial(self.project, worker.copy.sources, worker.copy.temporary, target, limit)

    def _take(self, worker: _Worker, outcome: Outcome, results: dict[str, Result]) -> None:
        job, worker.trial = worker.job, None
        assert job is not None
        job.seconds += outcome.seconds
        if job.mutant is None:
            wrong = outcome.error or (f"fails without a mistake: {outcome.failed}" if outcome.failed else "")
            self._finish(worker, "error" if wrong else "passed", wrong, results)
        elif outcome.failed:
            self._finish(worker, "killed", outcome.failed, results)
        elif outcome.error:
            self._finish(worker, "error", outcome.error, results)
        elif job.targets:
            worker.copy.empty()
            self._start(worker, job)
        else:
            self._finish(worker, "error" if job.error else "survived", job.error, results)

    def _finish(self, worker: _Worker, outcome: str, by: str, results: dict[str, Result]) -> None:
        job, worker.job = worker.job, None
        assert job is not None
        worker.copy.restore()
        results[job.name] = result = Result(job.key, job.name, outcome, by, round(job.seconds, 2))
        self.ledger.add(result)
        self.say(f"{outcome:8} {job.name} {f'({by}) ' if by else ''}{job.seconds:.1f} s")


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
