"""How much memory a command takes, its children included."""

import sys
import threading

import psutil


class MemoryWatch:
    """The largest proportional set size of a process (this one) and all its children, looked at every `seconds`."""

    peak_gib = 0.0

    def __init__(self, pid: int | None = None, seconds: float = 1.0):
        self._process = psutil.Process(pid)
        self._seconds = seconds

    def __enter__(self) -> "MemoryWatch":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            total = 0
            for process in self._family():
                try:
                    memory = process.memory_full_info()
                    # Linux counts shared pages by share; elsewhere what a process has to itself comes closest.
                    total += memory.pss if sys.platform == "linux" else memory.uss
                except psutil.Error:
                    continue  # it ended meanwhile
            self.peak_gib = max(self.peak_gib, total / 2**30)

    def _family(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
