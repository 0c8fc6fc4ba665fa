"""The watch that each rank keeps, in a thread: on its neighbours' processes and on word from afar; rank 0 on everyone.

A rank publishes where it is every second and looks whether the run is to end. So one that waits in a collective ends
within seconds of the fault elsewhere, and what is said is the fault, not what it did to a connection.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from distill import lifeline
from distill.errors import EXIT_FAILED, EXIT_PREEMPTED
from distill.preemption import notice
from distill.vigil import stacks, words
from distill.vigil.board import Beat, Board, Verdict
from distill.vigil.neighbours import Neighbours, place
from distill.vigil.overseer import Overseer
from distill.whereabouts import here

_LOOK_SECONDS, _BEAT_SECONDS = 0.25, 1.0
# A rank that cannot publish for so long has lost the network, or its interpreter is stuck.
_SILENT_SECONDS = 60.0
# After a connection has broken somewhere, a rank that is silent for so long is what has broken it.
_BROKEN_SECONDS = 5.0
# So who has noticed waits for that to be said.
_CAUSE_SECONDS = 8.0
# Rank 0 holds the store: it stays until the others have read the verdict there.
_HEAR_SECONDS = 4.0
# A rank that has failed closes its wandb run; one that has bad input is about to say so.
_LEAVE_SECONDS = 10.0
# A launcher's SIGTERM may come before its reason.
_REASON_SECONDS = 1.0


class Vigil:
    """Of one rank. `hosts` are the names of the ranks' hosts, as far as they are known."""

    def __init__(self, store: dist.Store, rank: int, hosts: Sequence[str | None]):
        self.rank, self.hosts = rank, hosts
        self._store = store  # rank 0 serves it for as long as it lives
        self._board = Board.beside(store, rank, len(hosts))
        self._talk = self._board.another()
        self._neighbours, self._place = Neighbours(rank), place()
        self._overseer = Overseer(len(hosts)) if rank == 0 else None
        self._published, self._lock = 0, threading.Lock()
        self._spoken = self._told = time.monotonic()
        self._left = self._leaving = False
        self._code = EXIT_FAILED  # of this rank, where it is leaving
        self._over = threading.Event()
        self._where: tuple[int, str] | None = None
        self._beat_of_0: Beat | None = None
        self._stacks: Path | None = None

    def start(self) -> None:
        """Watch from now on; a signal to stop is noted, and no more the end of this process. Main thread only."""
        notice.listen()
        self._publish(self._board)
        self._board.settle(self._place, os.getpid())
        for work in (self._watch, self._hold_on):
            threading.Thread(target=work, daemon=True, name="vigil").start()

    def expect_progress(self, seconds: float, folder: Path) -> None:
        """From now on end all ranks if none makes progress for `seconds`; stacks go into `folder`/faults."""
        self._stacks = folder / "faults"
        if self._overseer:
            self._overseer.expect_progress(seconds)

    def close(self) -> None:
        """This rank has done its work. Rank 0 stays until all have: they read from its store."""
        self._left = True
        with suppress(dist.DistError):
            self._publish(self._board)
            while self._overseer and not self._overseer.all_left(self._board.beats()):
                time.sleep(_LOOK_SECONDS)
        self._over.set()

    def depart(self, code: int) -> None:
        """This rank ends with `code` and has said why; the others follow, where they do not come to the same end."""
        self._code, self._leaving = code, True
        with suppress(dist.DistError):
            self._stay(self._board, self._board.condemn(Verdict(code, "", self.rank)))

    def wait_for_end(self, seconds: float, code: int) -> bool:
        """Wait until some rank has ended all, at most for so long, to end with `code`; whether one has."""
        self._code, self._leaving = code, True
        deadline = time.monotonic() + seconds
        with suppress(dist.DistError):
            while time.monotonic() < deadline:
                if self._board.verdict():
                    return True
                time.sleep(_LOOK_SECONDS / 2)
        return False

    def fall(self, error: BaseException) -> int:
        """This rank has failed: say so, unless another's fault has made it fail; the exit code."""
        follows = words.follows(error)
        if follows:
            with suppress(dist.DistError):
                self._board.report_broken()
            time.sleep(_CAUSE_SECONDS)  # if there is a cause, the watch ends this process
        self._leaving = True
        ours = standing = Verdict(EXIT_FAILED, words.failed(self._name(self.rank), self._beat(), error), self.rank)
        with suppress(dist.DistError):
            standing = self._board.condemn(ours)
        if standing == ours or not follows:
            words.trace(error)
        if standing == ours:
            words.say(ours.words, words.resume())
        with suppress(dist.DistError):
            self._stay(self._board, standing)
        return EXIT_FAILED

    def _stay(self, board: Board, verdict: Verdict) -> None:
        """Rank 0 leaves when the others have heard; one that is killed or mute will not."""
        board.hear()
        deadline = time.monotonic() + _HEAR_SECONDS
        while self._overseer and time.monotonic() < deadline:
            if board.heard() >= len(self.hosts) - len(verdict.mute):
                return
            time.sleep(_LOOK_SECONDS / 5)

    def _name(self, rank: int) -> str:
        return words.name(rank, self.hosts[rank], rank == self.rank or rank in self._neighbours)

    def _beat(self) -> Beat:
        return Beat(self._published, here.step, here.phase, here.ticks, stacks.in_collective(), self._left)

    def _at(self, last: Beat | None) -> Beat:
        """Where a rank was that is gone: ranks keep step, and its last word may be older than a short one."""
        ours = self._beat()
        return last if last is not None and last.step >= ours.step else ours

    def _publish(self, board: Board) -> None:
        # After a beat that says that this rank has left there must be no other.
        with self._lock:
            self._published += 1
            beat = self._beat()
            board.publish(beat)
            self._where = beat.step, beat.phase
        self._spoken = time.monotonic()

    def _hold_on(self) -> None:
        """End this rank where its watch cannot, as that waits for a host that is gone."""
        while not self._over.wait(_BEAT_SECONDS):
            # The same if the interpreter is stuck, and with it this thread: the timer is none of Python's.
            faulthandler.dump_traceback_later(_SILENT_SECONDS, exit=True)
            if time.monotonic() - self._spoken > _SILENT_SECONDS and not self._leaving:
                self._leaving = True  # not for the watch to say that it was killed
                self._neighbours.kill((0,))  # it may be here, and frozen
                self._end_alone(f"has not answered for {_SILENT_SECONDS:.0f} s")
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        looked = time.monotonic()
        try:
            while not self._over.wait(_LOOK_SECONDS):
                # Where a rank was when it was killed is the last that it has said.
                if (here.step, here.phase) != self._where or time.monotonic() - self._spoken >= _BEAT_SECONDS:
                    self._publish(self._talk)
                if time.monotonic() - looked >= _BEAT_SECONDS:
                    looked = time.monotonic()
                    self._oversee()
                    if verdict := self._talk.verdict():
                        self._carry_out(verdict)
                self._look_at_neighbours()
                self._look_at_notice()
        except dist.DistError:
            # Where all is well rank 0 goes last.
            if self._over.wait(_LOOK_SECONDS):
                return
            if self._leaving:
                time.sleep(_LEAVE_SECONDS)  # the main thread is faster, unless it waits for who is gone
                _exit(self._code)
            self._end_alone(self._neighbours.gone().get(0, "is gone, or its host"))
        except Exception as error:
            # Without its watch this rank would be silent, and another be blamed for that.
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """The watch itself has failed, and with it this rank."""
        try:
            words.trace(error)
            told = words.failed(self._name(self.rank), self._beat(), error)
            self._carry_out(self._talk.condemn(Verdict(EXIT_FAILED, told, self.rank)))
        finally:
            _exit(self._code)

    def _look_at_neighbours(self) -> None:
        if len(self._neighbours) < int(os.environ.get("LOCAL_SIZE", "1")) - 1:
            self._neighbours.meet(self._talk.neighbours(self._place))
        gone = self._neighbours.gone()
        if 0 in gone and not self._leaving and not self._over.is_set():
            self._end_alone(gone[0])
        if 0 in self._neighbours:
            self._beat_of_0 = self._talk.beat(0)
        for rank, how in gone.items():
            beat = self._talk.beat(rank)
            if beat.left:
                self._neighbours.forget(rank)
            else:
                _wait_for_lifeline()
                died = words.died(self._name(rank), self._at(beat), how)
                self._carry_out(self._talk.condemn(Verdict(EXIT_FAILED, died, self.rank, mute=(rank,))))

    def _look_at_notice(self) -> None:
        """Before a run can save itself, to be told to stop is to end."""
        if not notice.told or notice.heeded or self._left:
            self._told = time.monotonic()
        elif time.monotonic() - self._told > _REASON_SECONDS:
            text = "told to stop before the first step: nothing is lost"
            self._carry_out(self._talk.condemn(Verdict(EXIT_PREEMPTED, text, self.rank)))

    def _oversee(self) -> None:
        if self._overseer is None:
            return
        if self._talk.told_to_leave():
            notice.tell()
        beats = self._talk.beats()
        patience = _BROKEN_SECONDS if self._talk.is_broken() else _SILENT_SECONDS
        if silent := self._overseer.silent(beats, patience):
            told = words.silent([self._name(rank) for rank in silent], beats[silent[0]], patience)
            self._carry_out(self._talk.condemn(Verdict(EXIT_FAILED, told, self.rank, mute=tuple(silent))))
        elif (seconds := self._overseer.stalled(beats)) and (suspects := self._overseer.suspects(beats)):
            names = [self._name(rank) for rank in suspects]
            told = words.stalled(names, beats[suspects[0]], seconds, self._stacks)
            self._carry_out(self._talk.condemn(Verdict(EXIT_FAILED, told, self.rank, stacks=True)))

    def _carry_out(self, verdict: Verdict) -> NoReturn:
        """End this rank, as all others end, whatever comes between."""
        try:
            self._take_leave(verdict)
        finally:
            _exit(verdict.code)

    def _take_leave(self, verdict: Verdict) -> None:
        if verdict.stacks and self._stacks is not None:
            with suppress(OSError):
                stacks.show(self._stacks / f"stacks-rank-{self.rank}.txt", f"stacks of {self._name(self.rank)}")
        if self._leaving or not verdict.words:
            time.sleep(_LEAVE_SECONDS)  # the main thread is faster
        else:
            # On its own host whoever found it says it, elsewhere the first that still lives.
            speaks = verdict.by == self.rank or (self._neighbours.first() and verdict.by not in self._neighbours)
            self._neighbours.kill(verdict.mute)
            if verdict.stacks:
                self._stay(self._talk, verdict)  # last words stand below everyone's stacks
            if speaks:
                _speak(verdict.words)
            if not verdict.stacks:
                self._stay(self._talk, verdict)

    def _end_alone(self, how: str) -> NoReturn:
        """Rank 0 is gone, and with it what the ranks talk through."""
        try:
            _wait_for_lifeline()
            if self._neighbours.first():
                _speak(words.died(self._name(0), self._at(self._beat_of_0), how))
        finally:
            _exit(EXIT_FAILED)


_kept: Vigil | None = None


def keep(store: dist.Store, rank: int, hosts: Sequence[str | None]) -> Vigil:
    """Start this rank's watch."""
    global _kept
    _kept = Vigil(store, rank, hosts)
    _kept.start()
    return _kept


def kept() -> Vigil | None:
    """This rank's watch; None for a command that keeps none."""
    return _kept


def _wait_for_lifeline() -> None:
    """Where what started all ranks here is gone each ends by itself, and says that."""
    if lifeline.is_broken():
        time.sleep(_CAUSE_SECONDS)


def _speak(told: str) -> None:
    """Stay after it, so that the others here see that there was one before them."""
    words.say(told, words.resume())
    time.sleep(_BEAT_SECONDS + _LOOK_SECONDS)


def _exit(code: int) -> NoReturn:
    words.flush()
    os._exit(code)
