"""Being told to stop: SIGTERM and SIGUSR1 are remembered until a step is finished and the run can save itself."""

import signal
import socket
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Notice:
    """Whether this process has been told to stop, by a signal or otherwise."""

    def __init__(self) -> None:
        self.heeded = False
        """Whether a run is under way that looks here at its step boundaries, and can save itself."""
        self._told = False
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def listen(self) -> None:
        """Take the signals from now on, which end this process no more. Main thread only."""
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        # Python runs handlers between two lines of the main thread, which may wait in a collective: the byte that is
        # written at once is what counts.
        signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _hear)
            signal.siginterrupt(number, False)

    def tell(self) -> None:
        """As by a signal."""
        self._told = True

    @property
    def told(self) -> bool:
        """Whether to stop; on any thread."""
        if self._ends is not None:
            with suppress(BlockingIOError):
                # Never set to False: another thread may have read the signal's byte meanwhile.
                if any(byte in SIGNALS for byte in self._ends[0].recv(4096)):
                    self._told = True
        return self._told


notice = Notice()
"""Of this process."""


def _hear(_: int, __: FrameType | None) -> None:
    notice.tell()
