"""Processes in place of a launch: who ends when another is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from distill import lifeline

RANK = "from distill import lifeline; import time; lifeline.hold(); print('up', flush=True); time.sleep(60)"
# DeepSpeed's launcher: it is told by its argument, and lives on when what started it dies.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2]])"
RUNNER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], '--world_info=e30=', sys.argv[2]])"


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    started: list[subprocess.Popen] = []

    def begin(*command: str) -> subprocess.Popen:
        process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def ends(process: psutil.Process, seconds: float = 10) -> bool:
    try:
        process.wait(timeout=seconds)
    except psutil.TimeoutExpired:
        return False
    return True


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_rank_ends_with_its_launcher_and_with_what_started_that(start: Callable) -> None:
    for victim in (0, 1):
        runner = start(sys.executable, "-c", RUNNER, LAUNCHER, RANK)
        launcher, rank = family(runner)
        assert rank.is_running()
        os.kill((runner.pid, launcher.pid)[victim], signal.SIGKILL)
        assert ends(rank), victim
        assert ends(launcher), victim


def test_a_rank_of_another_host_ends_with_pdsh(start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell started the launcher there, and pdsh, as our launch has told, holds the other end of stdin."""
    monkeypatch.setenv(lifeline.STDIN, "1")
    shell = start("sh", "-c", '"$@"; true', "sh", sys.executable, "-c", LAUNCHER, "--world_info=e30=", RANK)
    launcher, rank = family(shell)
    assert shell.stdin
    shell.stdin.write("\n")
    shell.stdin.flush()
    assert not ends(rank, 2), "it is the end of stdin that tells, not what comes there"
    shell.stdin.close()
    assert ends(rank)
    assert ends(launcher)


def test_nothing_is_watched_where_it_would_be_wrong(start: Callable) -> None:
    """A local launch whose stdin ends, one that a scheduler's shell has started, and a command without a launcher."""
    srun = start("sh", "-c", '"$@"; true', "sh", sys.executable, "-c", LAUNCHER, "--world_info=e30=", RANK)
    runner = start(sys.executable, "-c", RUNNER, LAUNCHER, RANK)
    alone = start("sh", "-c", '"$@"; true', "sh", sys.executable, "-c", RANK)
    for process in (runner, alone, srun):
        assert process.stdin
        process.stdin.close()
    time.sleep(3)
    assert len(family(runner)) == 2
    assert len(family(srun)) == 2
    (rank,) = family(alone)
    os.kill(alone.pid, signal.SIGKILL)
    assert not ends(rank, 3)
    rank.kill()
    for rank in family(srun):
        rank.kill()


def test_a_closed_stdin_is_no_lifeline(start: Callable) -> None:
    """Nor a reason not to start."""
    shell = start("sh", "-c", '"$@" <&-; true', "sh", sys.executable, "-c", LAUNCHER, "--world_info=e30=", RANK)
    launcher, rank = family(shell)
    assert not ends(rank, 3)
    for process in (launcher, rank):
        process.kill()


@pytest.mark.parametrize("error", [psutil.NoSuchProcess(1), ConnectionResetError()])
def test_what_cannot_be_asked_any_more_is_gone(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Launcher:
        pid = os.getppid()

        def ppid(self) -> int:
            raise error

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    lifeline._watch(lifeline.Lifeline(Launcher(), 1, False))  # type: ignore[arg-type]
    assert codes == [1]


@pytest.mark.parametrize(("chain", "expected"), [("sh sshd", True), ("sshd-session x", True), ("sh srun", False)])
def test_only_a_command_of_ssh_lies_under_sshd(chain: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, number: int) -> None:
            self.number = number

        def name(self) -> str:
            return chain.split()[self.number]

        def parent(self) -> "Process | None":
            return Process(self.number + 1)

    monkeypatch.setattr(psutil, "Process", Process)
    assert lifeline._under_sshd(0) is expected
