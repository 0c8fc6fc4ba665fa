"""What ranks write for each other into the store where they met. One key a rank, which rank 0 alone reads from afar."""

import json
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PREFIX = "vigil"
_LEAVE, _END, _HEARD, _BROKEN = "leave", "end", "heard", "broken"


@dataclass(frozen=True)
class Beat:
    """What a rank does just now."""

    number: int
    step: int
    phase: str
    ticks: int
    waits: bool
    """Whether its main thread is in a collective: for the others."""
    left: bool = False
    """Whether it has done its work."""

    @property
    def where(self) -> str:
        """As words."""
        where = f"at step {self.step}" if self.step else "before the first step"
        return f"{where} in {self.phase}" if self.phase else f"{where}, between phases"


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end."""

    code: int
    words: str
    by: int
    """The rank that found it out."""
    stacks: bool = False
    """Whether every rank shows first where its threads are."""
    mute: tuple[int, ...] = ()
    """Ranks that do not answer: their neighbours kill them."""


class Board:
    """One thread's connection; `another` makes one for another thread, as a store's calls wait for each other."""

    def __init__(self, store: Any, rank: int, world: int):
        """`store` is a `dist.Store`, whose stubs lack half of what it can do."""
        self._store, self.rank, self._beats = store, rank, [f"beat/{one}" for one in range(world)]

    @classmethod
    def beside(cls, store: Any, rank: int, world: int) -> "Board":
        """In the ranks' own store."""
        return cls(dist.PrefixStore(_PREFIX, store.clone()), rank, world)

    def another(self) -> "Board":
        """The same board for another thread."""
        return Board(self._store.clone(), self.rank, len(self._beats))

    def publish(self, beat: Beat) -> None:
        """Tell what this rank does."""
        self._store.set(self._beats[self.rank], json.dumps(asdict(beat)))

    def beat(self, rank: int) -> Beat:
        """The last of one rank, which has had one."""
        return Beat(**json.loads(self._store.get(self._beats[rank])))

    def beats(self) -> list[Beat]:
        """The last of every rank, in order; empty until all have had one."""
        if not self._store.check(self._beats):
            return []
        return [Beat(**json.loads(text)) for text in self._store.multi_get(self._beats)]

    def settle(self, place: str, pid: int) -> None:
        """Be known to the ranks that can see this process."""
        self._store.append(f"place/{place}", f"{self.rank}:{pid} ")

    def neighbours(self, place: str) -> dict[int, int]:
        """Process ids by rank of all that have settled there."""
        pairs = self._store.get(f"place/{place}").decode().split()
        return {int(rank): int(pid) for rank, _, pid in (pair.partition(":") for pair in pairs)}

    def condemn(self, verdict: Verdict) -> Verdict:
        """End the run; the verdict that stands, which is another one if that came first."""
        return _read(self._store.compare_set(_END, "", json.dumps(asdict(verdict))))

    def verdict(self) -> Verdict | None:
        """The one that stands."""
        return _read(self._store.get(_END)) if self._store.check([_END]) else None

    def hear(self) -> None:
        """This rank knows the verdict, and needs the store no more."""
        self._store.add(_HEARD, 1)

    def heard(self) -> int:
        """How many ranks know it."""
        return int(self._store.add(_HEARD, 0))

    def report_broken(self) -> None:
        """This rank has lost a connection to another."""
        self._store.set(_BROKEN, "")

    def is_broken(self) -> bool:
        """Whether any rank has."""
        return bool(self._store.check([_BROKEN]))

    def told_to_leave(self) -> bool:
        """Whether the launch has asked the run to save itself and stop."""
        return bool(self._store.check([_LEAVE]))


def call(address: str, port: int, verdict: Verdict | None, patience: timedelta = timedelta(seconds=2)) -> bool:
    """From outside of the run that meets there: end it, or let it save itself and stop; whether its ranks listen."""
    try:
        whole = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        store = dist.PrefixStore(_PREFIX, whole)
        if not store.check(["beat/0"]):
            return False
        if verdict is None:
            store.set(_LEAVE, "")
        else:
            store.compare_set(_END, "", json.dumps(asdict(verdict)))
        return True
    except dist.DistError:
        return False


def _read(text: bytes) -> Verdict:
    found = json.loads(text)
    return Verdict(**found | {"mute": tuple(found["mute"])})
