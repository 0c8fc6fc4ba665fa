"""So much a minute, and so much in all: what threads wait for before they ask."""

import threading
import time


class Stopped(Exception):
    """Raised in threads that wait when there is nothing more to wait for."""


class Spent(Exception):
    """Raised where the next request, which may cost `most`, might pass the limit of costs."""

    def __init__(self, most: float):
        self.most = most
        super().__init__(most)


class Pace:
    """Spreads a limit a minute evenly, without bursts: what was taken must be worked off before more is given."""

    def __init__(self, per_minute: float | None):
        self._seconds = 60 / per_minute if per_minute else 0.0
        """Of one unit."""
        self._free = time.monotonic()
        """When all is worked off."""
        self._changed = threading.Condition()
        self._open = True

    def take(self, amount: float = 1.0) -> None:
        """Wait for one's turn, and take `amount`, however large.

        Raises:
            Stopped: `stop` was called.
        """
        with self._changed:
            while self._open and (wait := self._free - time.monotonic()) > 0:
                self._changed.wait(wait)
            if not self._open:
                raise Stopped
            self._free = max(self._free, time.monotonic()) + amount * self._seconds

    def give_back(self, amount: float) -> None:
        """What was taken and then not used; below 0, what was used beyond that."""
        with self._changed:
            self._free -= amount * self._seconds
            self._changed.notify_all()

    def stop(self) -> None:
        """Send all who wait away."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


class Budget:
    """What requests may cost together. Each reserves the most that it may cost, and is charged what it did cost."""

    def __init__(self, limit: float | None):
        self.limit, self.spent = limit, 0.0
        self._reserved = 0.0
        self._running = 0
        self._changed = threading.Condition()
        self._open = True

    def reserve(self, most: float) -> None:
        """Wait until requests that run leave room for one of at most so much.

        Raises:
            Spent: there is none, and no request runs that may cost less than it reserved.
            Stopped: `stop` was called.
        """
        with self._changed:
            while self._open and not self._fits(most):
                if not self._running:
                    raise Spent(most)
                self._changed.wait()
            if not self._open:
                raise Stopped
            self._reserved += most
            self._running += 1

    def settle(self, most: float, cost: float) -> None:
        """A request that reserved `most` is done, at `cost`."""
        with self._changed:
            self._reserved -= most
            self._running -= 1
            self.spent += cost
            self._changed.notify_all()

    def stop(self) -> None:
        """Send all who wait away."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def _fits(self, most: float) -> bool:
        return self.limit is None or self.spent + self._reserved + most <= self.limit
