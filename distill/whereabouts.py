"""What this rank is doing: for the last words of a run that ends by a fault. A process is one rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Whereabouts:
    """Written by the training thread, read by the thread that watches it."""

    step: int = 0
    """The optimizer step under way, from 1; 0: none yet."""
    phase: str = "start"
    """Empty between two phases."""
    ticks: int = 0
    """Grows as long as there is progress."""

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Be in `phase` until the block ends; an exception leaves it as it was when it was raised."""
        before, self.phase = self.phase, phase
        self.ticks += 1
        yield
        self.phase = before
        self.ticks += 1

    def tick(self) -> None:
        """There is progress within a phase."""
        self.ticks += 1


here = Whereabouts()
"""Of this process."""
