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


def test_a_rank_of_another_host_ends_with_pdsh(start: Callable) -> None:
    """A shell started the launcher there, and pdsh holds the other end of stdin."""
    shell = start("sh", "-c", '"$@"; true', "sh", sys.executable, "-c", LAUNCHER, "--world_info=e30=", RANK)
    launcher, rank = family(shell)
    assert shell.stdin
    shell.stdin.close()
    assert ends(rank)
    assert ends(launcher)


def test_nothing_is_watched_where_it_would_be_wrong(start: Callable) -> None:
    """A local launch whose stdin ends, and a command without a launcher."""
    runner = start(sys.executable, "-c", RUNNER, LAUNCHER, RANK)
    alone = start("sh", "-c", '"$@"; true', "sh", sys.executable, "-c", RANK)
    for process in (runner, alone):
        assert process.stdin
        process.stdin.close()
    time.sleep(3)
    assert len(family(runner)) == 2
    (rank,) = family(alone)
    os.kill(alone.pid, signal.SIGKILL)
    assert not ends(rank, 3)
    rank.kill()
