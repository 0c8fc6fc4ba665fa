"""Runs pytest on a copy of the sources, in a fork of this process that has imported the large libraries already.

The fork forgets every module of the project and imports the copy's. This process stays without threads, and computes
nothing: what is forked is whole.
"""

import ctypes
import gc
import importlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Variables of all tests; with more threads workers would take each other's cores."""
_NO_PYTEST = 70
_PR_SET_PDEATHSIG = 1
_CODES = {
    pytest.ExitCode.INTERRUPTED: "the tests cannot be collected",
    pytest.ExitCode.INTERNAL_ERROR: "pytest itself failed",
    pytest.ExitCode.USAGE_ERROR: "pytest does not know this target",
    pytest.ExitCode.NO_TESTS_COLLECTED: "the target selects no test",
    _NO_PYTEST: "pytest did not start",
}


def preload(modules: Sequence[str]) -> None:
    """Import what forks need, for all of them: these modules and pytest's plugins. Before the first fork."""
    os.environ.update(ENVIRONMENT)
    for name in modules:
        importlib.import_module(name)
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    gc.freeze()  # pytest collects garbage at its end: forks need not look through all that again


@dataclass(frozen=True)
class Outcome:
    """Result of one run of pytest; exactly one of the first three is the case."""

    passed: bool = False
    failed: str | None = None
    """The test that failed, or `timeout`."""
    error: str | None = None
    """Why it says nothing: no test was run, or not to its end."""
    seconds: float = 0.0


class _Recorder:
    """A plugin of pytest that writes down what came of the tests."""

    def __init__(self, path: Path):
        self.path, self.passed, self.failed, self.broken = path, 0, "", ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for set-up, call and tear-down of each test."""
        if report.failed:
            self.failed = self.failed or report.nodeid
        elif report.passed and report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        """Called for each file and class that is collected."""
        if report.failed:
            self.broken = self.broken or report.nodeid

    def pytest_sessionfinish(self) -> None:
        """Called at the end, even if nothing could be collected."""
        found = {"passed": self.passed, "failed": self.failed, "broken": self.broken}
        self.path.write_text(json.dumps(found), encoding="utf-8")


class Trial:
    """A run of pytest on one target that is going on."""

    def __init__(self, project: Path, sources: Path, temporary: Path, target: str, limit: float):
        self._report, self._log = temporary / "report.json", temporary / "log"
        self._limit, self._started = limit, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _be_pytest(project, sources, temporary, target, self._log, self._report)

    def poll(self) -> Outcome | None:
        """Return how it ended, or None while it runs. A run that takes too long is ended and counts as noticed."""
        seconds = time.monotonic() - self._started
        if os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if seconds < self._limit:
                return None
            self.stop()
            return Outcome(failed="timeout", seconds=seconds)
        return self._outcome(self.stop(), seconds)

    def stop(self) -> int:
        """End it and all that it has started; return its wait status."""
        family = []
        with suppress(psutil.Error):
            family = psutil.Process(self._pid).children(recursive=True)
        # Not yet waited for: the number of the process, and of its group, is still its own.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        return os.waitpid(self._pid, 0)[1]

    def _outcome(self, status: int, seconds: float) -> Outcome:
        code = os.waitstatus_to_exitcode(status)
        found = json.loads(self._report.read_text(encoding="utf-8")) if self._report.exists() else None
        if code == pytest.ExitCode.OK and found and found["passed"]:
            return Outcome(passed=True, seconds=seconds)
        if code == pytest.ExitCode.TESTS_FAILED and found and found["failed"]:
            return Outcome(failed=found["failed"], seconds=seconds)
        if code == pytest.ExitCode.OK:
            return Outcome(error="all tests of the target are skipped", seconds=seconds)
        said = _CODES.get(code, f"a signal ended pytest ({-code})" if code < 0 else f"pytest ended with {code}")
        return Outcome(error=f"{said}: {(found and found['broken']) or self._last_line()}", seconds=seconds)

    def _last_line(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        lines = [line for line in text.splitlines() if "Error" in line or line.startswith("ERROR")]
        return (lines or text.splitlines() or ["it says nothing"])[-1].strip()[:200]


def _be_pytest(project: Path, sources: Path, temporary: Path, target: str, log: Path, report: Path) -> NoReturn:
    code = _NO_PYTEST
    try:
        os.setsid()
        with suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        with open(os.devnull) as nothing, log.open("wb") as output:
            for stream, place in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(stream.fileno(), place)
        os.environ.update(ENVIRONMENT | {"TMPDIR": str(temporary)})
        tempfile.tempdir = None
        _forget(project)
        os.chdir(sources)
        sys.path.insert(0, str(sources))
        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
        code = int(pytest.main([*options, *shlex.split(target)], plugins=[_Recorder(report)]))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _forget(project: Path) -> None:
    """Let the next import of the project's modules find another copy's."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and file and _is_ours(Path(file), project):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not _is_ours(Path(entry or os.getcwd()), project)]
    os.environ.pop("PYTHONPATH", None)


def _is_ours(path: Path, project: Path) -> bool:
    """Whether a path is of the project itself, rather than of an environment of Python that lies in it."""
    path = path.absolute()
    if not path.is_relative_to(project) or "site-packages" in path.parts:
        return False
    return not any(part.startswith(".") for part in path.relative_to(project).parts)
