"""Starts of a run's ranks, and how they ended."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Life:
    """How a start of a run's ranks ended."""

    codes: list[int]
    """Exit codes by rank; negative: the signal."""
    seconds: float
    """From the first rank's end to the last's."""
    said: str
    orphans: bool

    def must_end(self, *codes: int) -> None:
        """Fail otherwise, with what was printed."""
        assert self.codes == list(codes), self.said[-4000:]


class Nursery:
    """Starts ranks in a second: tests/faults/nursery.py."""

    def __init__(self, root: Path, environment: dict[str, str], port: int):
        self.port = port
        # No thread in the process that is forked: not of Arrow's allocator, not of BLAS, not of OpenMP.
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        calm = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "TOKENIZERS_PARALLELISM": "false"}
        path = {"PYTHONPATH": f"{root}:{root / 'tests/faults'}"}
        self._process = subprocess.Popen(
            [sys.executable, str(root / "tests/faults/nursery.py")],
            cwd=root,
            env=environment | one | calm | path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def live(self, config: Path, *overrides: str, ranks: int = 2, order: dict | None = None) -> Life:
        """Start the ranks of a run, and wait until all have ended."""
        log = config.with_suffix(".log")
        log.write_text("")
        job = {"ranks": ranks, "arguments": ["--config", str(config), *overrides], "port": self.port, "log": str(log)}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job | {"break": order}) + "\n")
        self._process.stdin.flush()
        pids, ended = self._answer()["pids"], self._answer()
        return Life(ended["codes"], ended["seconds"], log.read_text(), _group_lives(pids[0]))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the nursery has ended"
        return dict(json.loads(line))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _group_lives(group: int) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)
        return True
    return False
