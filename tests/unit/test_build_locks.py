"""A lock of a build goes if its builder is gone, and only then."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill import build_locks
from distill.build_locks import remove_stale_locks

# As torch does: the lock is open in this process only, and ninja works in its folder.
BUILDER = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(60)"
NINJA = "import os, sys, time; os.chdir(os.path.dirname(sys.argv[1])); print(flush=True); time.sleep(60)"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock of DeepSpeed's communication will lie; old at once."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_locks, "_SETTLED_SECONDS", 0.0)
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    return folder / "lock"


@pytest.fixture
def begin(lock: Path) -> Iterator[Callable[[str], subprocess.Popen]]:
    started: list[subprocess.Popen] = []

    def run(text: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", text, str(lock)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_a_lock_goes_with_its_builder_and_not_before(
    lock: Path, begin: Callable, capsys: pytest.CaptureFixture
) -> None:
    builder = begin(BUILDER)
    remove_stale_locks()
    assert lock.exists()
    builder.kill()
    builder.wait()
    remove_stale_locks()
    assert not lock.exists()
    assert capsys.readouterr().err == f"distill: removed {lock}, left by a build that was killed\n"


def test_a_compiler_that_has_outlived_its_builder_holds_the_lock(lock: Path, begin: Callable) -> None:
    lock.touch()
    begin(NINJA)
    remove_stale_locks()
    assert lock.exists()


def test_ranks_that_find_one_lock_leave_the_build_of_the_first(
    lock: Path,
    begin: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second one has judged the old lock, and comes to remove it when the first builds under a new one."""
    lock.touch()
    judge, calls = build_locks._held, []

    def slow(path: Path) -> bool:
        held = judge(path)
        calls.append(held)
        if len(calls) == 1:
            remove_stale_locks()
            assert not lock.exists()
            begin(BUILDER)
        return held

    monkeypatch.setattr(build_locks, "_held", slow)
    remove_stale_locks()
    assert lock.exists()


def test_a_young_lock_is_looked_at_later(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(build_locks, "_SETTLED_SECONDS", 5.0)
    monkeypatch.setattr(build_locks.time, "sleep", slept.append)
    lock.touch()
    remove_stale_locks()
    assert 3 < slept[0] <= 5
    assert not lock.exists()


def test_a_lock_that_another_host_may_hold_is_named(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(build_locks, "_filesystem", lambda path: "nfs4")
    lock.touch()
    remove_stale_locks()
    assert lock.exists()
    assert capsys.readouterr().err.startswith(f"distill: no process here holds the build lock {lock}; remove it if")


def test_many_ranks_at_once(lock: Path) -> None:
    lock.touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: remove_stale_locks(), range(4)))
    assert not lock.exists()
    assert build_locks._filesystem(Path("/proc/self/status")) == "proc"
