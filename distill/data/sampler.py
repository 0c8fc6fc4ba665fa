"""Which records make up which batch: a pure function of (seed, position), so a resumed run needs no saved state."""

import numpy as np


class ShuffledStream:
    """An endless stream of record indices: every epoch is a new permutation of all `size` records.

    Streams of one seed on different axes have nothing to do with each other.
    """

    def __init__(self, size: int, seed: int, axis: int = 0):
        self.size, self.seed, self.axis = size, seed, axis
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, position: int) -> int:
        """The record at a place of the stream."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng([self.seed, epoch, self.axis]).permutation(self.size),
            )
        return int(self._order[offset])

    def take(self, start: int, count: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """This rank's share of the global batch at `start`: every `ranks`-th of its `count` records."""
        return [self.at(start + offset) for offset in range(rank, count, ranks)]
