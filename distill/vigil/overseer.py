"""What rank 0 concludes from everyone's beats: who is silent, whether the run stands still, and who holds it up."""

import time
from collections.abc import Callable, Sequence

from distill.vigil.board import Beat


class Overseer:
    """By rank 0's own clock; a beat counts when it differs from the one before."""

    def __init__(self, world: int, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._heard = [(0, clock())] * world
        self._progress: tuple[object, float] = (None, clock())
        self._patience: float | None = None

    def expect_progress(self, seconds: float) -> None:
        """From now on a run without progress for so long stands still."""
        self._progress, self._patience = (None, self._clock()), seconds

    def silent(self, beats: Sequence[Beat], seconds: float) -> list[int]:
        """Ranks that have neither left nor been heard of for so long."""
        now = self._clock()
        for rank, beat in enumerate(beats):
            if beat.number != self._heard[rank][0] or beat.left:
                self._heard[rank] = beat.number, now
        return [rank for rank, (_, when) in enumerate(self._heard) if beats and now - when > seconds]

    def stalled(self, beats: Sequence[Beat]) -> float:
        """For how many seconds no rank has made progress, if that is too long; else 0."""
        now, seen = self._clock(), [(beat.step, beat.ticks, beat.left) for beat in beats]
        if seen != self._progress[0]:
            self._progress = seen, now
        still = now - self._progress[1]
        return still if self._patience is not None and still > self._patience else 0.0

    def suspects(self, beats: Sequence[Beat]) -> list[int]:
        """Whom the others wait for: ranks outside of a collective, of them the ones furthest behind."""
        at_work = [rank for rank, beat in enumerate(beats) if not beat.left]
        outside = [rank for rank in at_work if not beats[rank].waits]
        found = outside or at_work
        least = min(((beats[rank].step, beats[rank].ticks) for rank in found), default=(0, 0))
        return [rank for rank in found if (beats[rank].step, beats[rank].ticks) == least]

    def all_left(self, beats: Sequence[Beat]) -> bool:
        """Whether everyone has done its work."""
        return bool(beats) and all(beat.left for beat in beats)
