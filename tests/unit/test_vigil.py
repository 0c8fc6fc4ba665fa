"""Ranks that watch each other, as processes of their own that share a store; and what is concluded, by itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from distill import topology  # what a rank would import at its end
from distill.console import run_on_ranks
from distill.errors import BadInput, Ended, Problem
from distill.preemption import notice
from distill.vigil import watch, words
from distill.vigil.board import Beat, Board, Verdict, call
from distill.vigil.neighbours import Neighbours
from distill.vigil.overseer import Overseer
from distill.vigil.watch import keep
from distill.whereabouts import here

BEAT = Beat(number=1, step=3, phase="forward", ticks=7, waits=True)
Body = Callable[[], object]


class Ranks:
    """Forked processes; each keeps a watch and runs its body as a command of the command line."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port, self.pids = folder, port, {}

    def start(self, *bodies: Body) -> None:
        for rank, body in enumerate(bodies):
            pid = os.fork()
            if pid == 0:
                self._be(rank, len(bodies), body)
            self.pids[rank] = pid

    def _be(self, rank: int, world: int, body: Body) -> None:
        code = 70
        try:
            with (self.folder / str(rank)).open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            # pytest's own stand-ins do not lead there.
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world)}

            def command() -> object:
                store = dist.TCPStore("127.0.0.1", self.port, is_master=rank == 0, wait_for_workers=False)
                keep(store, rank, [None] * world)
                here.step, here.phase = 5, "rollouts"
                (self.folder / f"up-{rank}").touch()
                return body()

            code = run_on_ranks(command)
            sys.stderr.flush()
        finally:
            os._exit(code)

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 30
        while not all((self.folder / f"up-{rank}").exists() for rank in self.pids):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.5)  # they have met

    def codes(self, seconds: float = 20) -> list[int]:
        """Of all, once they have ended."""
        codes, ranks, deadline = {}, sorted(self.pids), time.monotonic() + seconds
        while len(codes) < len(self.pids) and time.monotonic() < deadline:
            for rank in self.pids.keys() - codes.keys():
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        for rank in self.pids.keys() - codes.keys():
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
        self.pids = {}
        return [codes.get(rank, -99) for rank in ranks]

    def said(self, rank: int) -> str:
        """Of ours, and whether there was a traceback: torch tells of a lost store by itself."""
        lines = (self.folder / str(rank)).read_text().splitlines()
        return "".join(f"{line}\n" for line in lines if line.startswith(("distill: ", "Traceback")))


@pytest.fixture
def ranks(tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setenv("DISTILL_COMMAND", "launch it")
    found = Ranks(tmp_path, free_port())
    yield found
    found.codes(0)


def sleep(seconds: float = 60) -> Body:
    return lambda: time.sleep(seconds)


def fails(error: BaseException, seconds: float = 0) -> Body:
    def body() -> None:
        time.sleep(seconds)
        raise error

    return body


def test_a_killed_rank_ends_the_others(ranks: Ranks) -> None:
    ranks.start(sleep(), sleep(), sleep())
    ranks.wait_until_up()
    os.kill(ranks.pids[1], signal.SIGKILL)
    time.sleep(1)  # as its launcher, which does not look at once
    assert ranks.codes(8) == [1, -signal.SIGKILL, 1]
    told = ranks.said(0) + ranks.said(2)
    assert told.count("was killed (SIGKILL) at step 5 in rollouts; the kernel does that where memory runs out\n") == 1
    assert "distill: rank 1 (" in told
    assert told.endswith("distill: to resume: launch it\n")


def test_the_end_of_rank_0_and_its_store_ends_the_others(ranks: Ranks) -> None:
    ranks.start(sleep(), sleep(), sleep())
    ranks.wait_until_up()
    os.kill(ranks.pids[0], signal.SIGKILL)
    assert ranks.codes(8) == [-signal.SIGKILL, 1, 1]
    assert "distill: rank 0 (" in ranks.said(1)
    assert ranks.said(2) == "", "one speaks for a host"


def test_ranks_that_finish_early_or_late_are_not_taken_for_killed(ranks: Ranks) -> None:
    """Rank 0 first: the others still talk through its store."""
    ranks.start(sleep(0), sleep(3), sleep(1))
    assert ranks.codes() == [0, 0, 0]
    assert [ranks.said(rank) for rank in range(3)] == ["", "", ""]


def test_an_exception_is_told_once_and_ends_all(ranks: Ranks) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    ranks.start(fails(lost, 0.5), fails(ValueError("first line\nsecond"), 1), sleep())
    assert ranks.codes(10) == [1, 1, 1]
    assert "Traceback" in ranks.said(1)
    assert ranks.said(1).endswith("in rollouts: ValueError: first line\ndistill: to resume: launch it\n")
    assert ranks.said(0) == "", "what broke its connection was the other"
    assert ranks.said(2) == ""


def test_a_broken_connection_without_a_cause_is_told(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_CAUSE_SECONDS", 2)
    ranks.start(sleep(), fails(RuntimeError("NCCL error: remote process exited")))
    assert ranks.codes(15) == [1, 1]
    assert "failed at step 5 in rollouts: RuntimeError: NCCL error" in ranks.said(1)


def test_who_is_silent_when_a_connection_breaks_has_broken_it(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is alone on its host, where nobody sees its process."""
    monkeypatch.setattr(watch, "_BROKEN_SECONDS", 2)
    monkeypatch.setattr(watch, "place", lambda: os.environ["RANK"])
    ranks.start(sleep(), sleep(), fails(RuntimeError("gloo: Connection closed by peer"), 4))
    ranks.wait_until_up()
    os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.codes(12) == [1, -signal.SIGKILL, 1]
    assert "distill: rank 1 not heard of for 2 s, last at step 5 in rollouts: " in ranks.said(0)
    assert "Traceback" not in ranks.said(2)


def test_a_watch_that_fails_blames_its_own_rank(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Neighbours) -> dict[int, str]:
        if os.environ["RANK"] == "1" and (ranks.folder / "up-1").exists():
            raise OSError(24, "Too many open files")
        return {}

    monkeypatch.setattr(Neighbours, "gone", gone)
    ranks.start(sleep(), sleep())
    assert ranks.codes(15) == [1, 1]
    assert ranks.said(1).startswith("Traceback")
    assert "failed at step 5 in rollouts: OSError: [Errno 24] Too many open files\n" in ranks.said(1)
    assert ranks.said(0) == ""


def test_a_full_disk_takes_no_words_and_changes_no_code(ranks: Ranks) -> None:
    def full(body: Body) -> Body:
        def work() -> object:
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
            os.dup2(2, 1)
            return body()

        return work

    ranks.start(full(fails(ValueError("x"), 2)), full(sleep()), full(sleep()))
    assert ranks.codes(15) == [1, 1, 1]


def test_a_rank_that_leaves_after_rank_0_ends_with_its_own_code(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its main thread has yet something to wait for."""
    monkeypatch.setattr(watch, "_LEAVE_SECONDS", 1)
    monkeypatch.setattr(topology, "stop", sleep())
    ranks.start(sleep(), fails(BadInput(Problem("a", 1, "wrong", "mend it"))))
    ranks.wait_until_up()
    os.kill(ranks.pids[0], signal.SIGKILL)
    assert ranks.codes(10) == [-signal.SIGKILL, 2]


def test_bad_input_of_all_or_one_is_told_by_one(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LEAVE_SECONDS", 2)
    bad = BadInput(Problem("a", 1, "wrong", "mend it"))
    ranks.start(fails(bad), fails(bad), sleep())
    assert ranks.codes() == [2, 2, 2]
    assert ranks.said(0) == "distill: a = 1: wrong; mend it\n"
    assert ranks.said(1) == ranks.said(2) == ""


def test_an_orderly_end_is_told_once(ranks: Ranks) -> None:
    ranks.start(fails(Ended(75, "saved")), fails(Ended(75, "saved"), 1))
    assert ranks.codes() == [75, 75]
    assert (ranks.said(0), ranks.said(1)) == ("distill: saved\n", "")


def test_told_to_stop_before_it_can_save_it_ends(ranks: Ranks) -> None:
    """Though the main thread waits."""
    ranks.start(sleep(), sleep())
    ranks.wait_until_up()
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.codes(8) == [75, 75]
    assert "distill: told to stop before the first step: nothing is lost\n" in ranks.said(1)


def test_a_run_that_can_save_itself_is_left_to_it(ranks: Ranks) -> None:
    def body() -> int:
        notice.heeded = True
        time.sleep(5)
        return 75 if notice.told else 1

    ranks.start(body, body)
    ranks.wait_until_up()
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.codes() == [1, 75]
    assert (ranks.said(0), ranks.said(1)) == ("", "")


@pytest.mark.parametrize("verdict", [None, Verdict(1, "the launch was told to end", -1)])
def test_the_launch_reaches_the_ranks(verdict: Verdict | None, ranks: Ranks) -> None:
    def boundary() -> None:
        notice.heeded = True
        while not notice.told:
            time.sleep(0.1)
        raise Ended(75, "saved")

    assert not call("127.0.0.1", ranks.port, verdict, timedelta(seconds=0.5)), "nobody is there"
    # In the run the ranks agree; here the other one ends by itself.
    ranks.start(boundary, fails(Ended(75, "saved"), 4) if verdict is None else sleep())
    ranks.wait_until_up()
    assert call("127.0.0.1", ranks.port, verdict)
    assert ranks.codes() == ([75, 75] if verdict is None else [1, 1])
    assert ("saved" if verdict is None else "the launch was told to end\ndistill: to resume") in ranks.said(0)


def test_the_first_verdict_stands(free_port: Callable[[], int]) -> None:
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    board, other = Board.beside(store, 0, 2), Board.beside(store, 1, 2)
    assert board.verdict() is None
    first = Verdict(1, "first", 0, mute=(1,))
    assert board.condemn(first) == other.condemn(Verdict(75, "second", 1)) == other.verdict() == first
    board.publish(BEAT)
    assert other.beats() == [], "until all have one"
    other.publish(replace(BEAT, left=True))
    assert board.beats() == [BEAT, replace(BEAT, left=True)]
    assert other.beat(0) == BEAT


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rank_without_a_new_beat_is_silent_unless_it_has_left() -> None:
    clock = Clock()
    overseer = Overseer(3, clock)
    clock.now = 31
    assert overseer.silent([], 30) == [], "not all have met yet"
    clock.now = 0
    for clock.now, number in ((1, 1), (29, 1), (32, 2)):
        beats = [replace(BEAT, number=number), BEAT, replace(BEAT, left=True)]
        silent = overseer.silent(beats, 30)
    assert silent == [1]


def test_a_run_stands_still_when_nobody_has_made_progress() -> None:
    clock = Clock()
    overseer = Overseer(2, clock)
    clock.now = 1000
    assert overseer.stalled([BEAT, BEAT]) == 0, "nothing is expected yet"
    overseer.expect_progress(60)
    for clock.now, ticks in ((1001, 7), (1050, 8), (1109, 8)):
        assert overseer.stalled([BEAT, replace(BEAT, ticks=ticks)]) == 0
    clock.now = 1111
    assert overseer.stalled([replace(BEAT, number=99), replace(BEAT, ticks=8)]) == 61


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([BEAT, replace(BEAT, waits=False)], [1]),
        ([BEAT, replace(BEAT, ticks=6)], [1]),
        ([replace(BEAT, step=2, ticks=9), BEAT], [0]),
        ([BEAT, replace(BEAT, waits=False, left=True)], [0]),
        ([replace(BEAT, waits=False, ticks=9), BEAT, replace(BEAT, waits=False, ticks=8)], [2]),
        ([BEAT, BEAT], [0, 1]),
    ],
)
def test_whom_the_others_wait_for(beats: list[Beat], expected: list[int]) -> None:
    assert Overseer(len(beats)).suspects(beats) == expected


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("kill -9 $$", "was killed (SIGKILL)"),
        ("kill -SEGV $$", "was killed (SIGSEGV)"),
        ("kill -40 $$", "was killed (signal 40)"),
        ("exit 3", "with exit code 3"),
    ],
)
def test_how_a_neighbour_ended(how: str, expected: str) -> None:
    with subprocess.Popen(["sh", "-c", f"read x; {how}"], stdin=subprocess.PIPE) as process:
        neighbours = Neighbours(1)
        neighbours.meet({1: os.getpid(), 2: process.pid})
        assert len(neighbours) == 1
        assert neighbours.gone() == {}
        assert process.stdin
        process.stdin.close()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)
        assert expected in neighbours.gone()[2]
        assert neighbours.first()
        process.wait()
        assert neighbours.gone() == {2: "was killed, or crashed"}, "nobody can be asked any more"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("gloo: can't allocate memory"),
    ],
)
def test_memory_is_named_and_what_to_turn(error: Exception) -> None:
    told = words.failed("rank 1 (a)", BEAT, error)
    assert told.startswith("rank 1 (a) ran out of memory at step 3 in forward: ")
    assert "turn down optim.micro_batch or rollout.batch, or set student.gradient_checkpointing=true" in told
    assert not words.follows(error), "it is a cause, and waits for no other"


def test_the_command_that_resumes_is_read_off_the_launcher(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a rank stands DeepSpeed's launcher, above that what the user has typed."""
    monkeypatch.setenv("DISTILL_COMMAND", "bash launch/train.sh --config 'a b.yaml'")
    assert words.resume() == "to resume: bash launch/train.sh --config 'a b.yaml'"
    monkeypatch.delenv("DISTILL_COMMAND")
    rank = "from distill import lifeline; print(lifeline.typed())"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    (tmp_path / "deepspeed").write_text(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {launcher!r}, '--world_info=e30='])"
    )
    for command, expected in (
        ([str(tmp_path / "deepspeed"), "x.sh", "--config", "a b.yaml"], "deepspeed x.sh --config 'a b.yaml'"),
        (["-c", launcher], "None"),
    ):
        done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, check=True)
        assert done.stdout == f"{expected}\n"
