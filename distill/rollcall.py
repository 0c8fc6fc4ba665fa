"""Hosts meet before anything starts: who is missing, whose code differs, which of them finds something wrong.

A process group would wait for all of that in silence, and then time out on a host that is fine. Ranks talk through the
store at the launcher's meeting point here; the process group then uses the same one.
"""

import base64
import json
import os
import resource
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from distill.console import speaks, tell
from distill.errors import Absence, BadInput, Problem, Unreachable
from distill.host import address_towards
from distill.lifeline import deepspeed_launcher
from distill.topology import choose_interface, find_ranks

T = TypeVar("T")

# A missing host is named after the first; a host that came up so much later than the others starts its ranks again.
_NAME_AFTER = timedelta(seconds=15)
_GIVE_UP_AFTER = timedelta(minutes=5)
# Rank 0 holds the store: the others read its last word before it goes.
_LAST_WORD_SECONDS = 5.0


@dataclass
class RollCall:
    """All ranks of a run that is about to start, on whichever hosts. Every method is collective."""

    store: dist.Store
    rank: int
    hosts: list[str | None]
    """By rank; None where neither the launcher nor the rank has told yet."""
    speaker: bool
    """Whether this rank is the first of its host."""
    stage: int = 0

    def enter(self) -> None:
        """Be the first of this rank here: the verdicts that an earlier start left in a store are not for this one.

        Raises:
            BadInput: the store is that of another start.
        """
        if self.store.add(f"distill/here/{self.rank}", 1) != 1:
            raise BadInput(port_taken(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"))

    def greet(self) -> None:
        """Hear of everyone, and find the way to another host.

        Raises:
            BadInput: one host has more ranks than another.
        Unreachable: a host is not there.
        """

        def judge(addresses: dict[str, list[str]]) -> list[Problem]:
            elsewhere = [address for host in addresses if host != self._name(0) for address in addresses[host]]
            self.store.set("distill/elsewhere", elsewhere[0] if elsewhere else "")
            problem = unequal_slots("host", self._name(0), Counter(map(self._name, range(len(self.hosts)))))
            return [problem] if problem else []

        ours = address_towards(os.environ["MASTER_ADDR"])
        self._exchange([] if ours is None else [ours], judge, _GIVE_UP_AFTER)
        choose_interface(os.environ["MASTER_ADDR"])
        # On the first host the meeting point may be a name of its loopback.
        if elsewhere := self.store.get("distill/elsewhere").decode():
            choose_interface(elsewhere)

    def together(self, work: Callable[[], T], patience: timedelta = _GIVE_UP_AFTER) -> T:
        """What `work` gives on this rank, once it has succeeded on all.

        Raises:
            BadInput: it raised that on some rank. Rank 0 raises the problems of all, the others one without any.
        """
        problems: list[Problem] = []
        try:
            result = work()
        except BadInput as error:
            problems = error.problems
        except Exception as error:
            stopped = Problem("host", self._name(self.rank), f"stopped with {type(error).__name__}", "see its output")
            with suppress(BadInput):
                self._exchange([_told(stopped)], self._united, patience)
            raise
        self._exchange([_told(problem) for problem in problems], self._united, patience)
        return result

    def in_turn(self, work: Callable[[], object], patience: timedelta = _GIVE_UP_AFTER) -> None:
        """Let rank 0 do `work`, then the first rank of every other host: what one finds wrong, or fetches, serves all.

        Raises:
            BadInput: as `together`.
        """
        self.together(work if self.rank == 0 else _nothing, patience)
        self.together(work if self.rank != 0 and self.speaker else _nothing, patience)

    def compare(self, facts: dict[str, str]) -> None:
        """Refuse hosts on which `facts` differ from those on rank 0's host.

        Raises:
            BadInput: names every such host and what differs; on ranks other than 0 it is empty.
        """
        self._exchange(facts if self.speaker else None, _differences, _GIVE_UP_AFTER)

    def _exchange(self, ours: Any, judge: Callable[[dict[str, Any]], list[Problem]], patience: timedelta) -> None:
        """Hand in `ours`; rank 0 judges everyone's, by host, and all hear whether the run goes on."""
        self.stage += 1
        key = f"distill/{self.stage}"
        self.store.set(f"{key}/{self.rank}", json.dumps([self._name(self.rank), ours]))
        if self.rank != 0:
            self._wait([f"{key}/verdict"], patience, self._name(0))
            if self.store.get(f"{key}/verdict") != b"go":
                self.store.add("distill/gone", 1)
                raise BadInput([])
            return
        found: dict[str, Any] = {}
        for rank in range(len(self.hosts)):
            self._wait([f"{key}/{rank}"], patience, self._name(rank))
            host, theirs = json.loads(self.store.get(f"{key}/{rank}"))
            if self.hosts[rank] is None:
                self.hosts[rank] = host
            if theirs is not None:
                found[host] = theirs if isinstance(theirs, dict) else found.get(host, []) + theirs
        if problems := judge(found):
            refused = BadInput(problems)
            # Before another rank leaves: some launchers kill all the rest then.
            tell(refused)
            self.store.set(f"{key}/verdict", "stop")
            self._let_go()
            raise refused
        self.store.set(f"{key}/verdict", "go")

    def _united(self, found: dict[str, list[list[str]]]) -> list[Problem]:
        """Everyone's problems, each once; those that rank 0's host does not share say where they are."""
        places: dict[tuple[str, ...], list[str]] = {}
        for host, theirs in found.items():
            for told in theirs:
                places.setdefault(tuple(told), []).append(host)
        problems = []
        for (field, value, wrong, mend), hosts in places.items():
            elsewhere = "" if self._name(0) in hosts or field == "host" else f" (on {', '.join(dict.fromkeys(hosts))})"
            problems.append(Problem(field, _Quoted(value), wrong + elsewhere, mend))
        return problems

    def _name(self, rank: int) -> str:
        name = self.hosts[rank]
        return socket.gethostname() if name is None and rank == self.rank else name or f"the host of rank {rank}"

    def _wait(self, keys: list[str], patience: timedelta, host: str) -> None:
        if _waits(lambda: self.store.wait(keys, min(_NAME_AFTER, patience))):
            return
        if self.speaker:
            print(f"distill: waiting for {host}", file=sys.stderr, flush=True)
        if not _waits(lambda: self.store.wait(keys, patience)):
            self._let_go()
            raise Unreachable(_not_heard_of(host, patience))

    def _let_go(self) -> None:
        """Rank 0 stays until the others have read the verdict."""
        deadline = time.monotonic() + _LAST_WORD_SECONDS
        while self.rank == 0 and time.monotonic() < deadline:
            if self.store.add("distill/gone", 0) >= len(self.hosts) - 1:
                return
            time.sleep(0.05)


def assemble() -> RollCall:
    """Call the roll of all ranks, as any launcher has placed them.

    Raises:
        BadInput: rank 0 cannot listen.
        Unreachable: a host is not there; names it.
    """
    find_ranks()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hosts = _hosts_by_rank(world)
    store: dist.Store = _open_store(rank, hosts[0])
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        store = _of_this_start(store, rank, world)
    present = RollCall(store, rank, hosts, speaks())
    present.enter()
    present.greet()
    return present


def port_taken(where: str) -> Problem:
    """The problem of a meeting point, told as address:port, that is not ours alone."""
    wrong = "another run listens there, or an earlier start of this one"
    return Problem("--master_port", where, wrong, "give a free port, or end what listens there")


def unequal_slots(field: str, value: str, ranks: Mapping[str, int]) -> Problem | None:
    """The problem of hosts with different numbers of ranks, if they have."""
    if len(set(ranks.values())) < 2:
        return None
    (first, most), *others = ranks.items()
    other = next((host, count) for host, count in others if count != most)
    wrong = f"{first} has {most} ranks, {other[0]} has {other[1]}"
    return Problem(field, value, wrong, "give all hosts the same number of slots")


def _open_store(rank: int, first_host: str | None) -> dist.TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def connect(patience: timedelta) -> dist.TCPStore:
        # Multi-tenant: the process group of this process shares the server and its port.
        return dist.TCPStore(
            address, port, is_master=listens, timeout=patience, wait_for_workers=False, multi_tenant=True
        )

    # torchrun's agent listens there itself.
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if listens:
        _allow_files()
        try:
            return connect(_GIVE_UP_AFTER)
        except dist.DistNetworkError as error:
            wrong = f"cannot listen there ({str(error).splitlines()[0][:120]})"
            raise BadInput(Problem("--master_port", port, wrong, "give a free port")) from None
    with suppress(dist.DistError):
        return connect(_NAME_AFTER)
    where = f"{first_host or 'rank 0'} at {address}:{port}"
    if speaks():
        print(f"distill: {socket.gethostname()} waits for {where}", file=sys.stderr, flush=True)
    try:
        return connect(_GIVE_UP_AFTER)
    except dist.DistError:
        wrong = f"not reached from {socket.gethostname()} in {_GIVE_UP_AFTER.total_seconds() / 60:.0f} minutes"
        mend = "see whether it is up and lets that port through, or give another of its addresses as --master_addr"
        raise Unreachable(Absence("host", where, wrong, mend)) from None


def _allow_files() -> None:
    """As many as this process may have: every other rank keeps several connections to rank 0."""
    with suppress(OSError, ValueError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _of_this_start(store: dist.Store, rank: int, world: int, patience: timedelta = _GIVE_UP_AFTER) -> dist.Store:
    """The part of a store of torchrun, which keeps it when it starts ranks again, that belongs to this start.

    How often it has started them, each agent counts for itself. So each rank asks under a name of its own, which no
    earlier one had, and rank 0 tells it the number of the start.

    Raises:
        Unreachable: a rank does not come, or rank 0.
    """
    if rank != 0:
        name = secrets.token_hex(8)
        store.set(f"distill/asks/{rank}", name)
        if not _waits(lambda: store.wait([f"distill/told/{name}"], patience)):
            raise Unreachable(_not_heard_of("rank 0", patience))
        number = store.get(f"distill/told/{name}").decode()
        store.set(f"distill/knows/{number}/{rank}", "")
        return dist.PrefixStore(f"start/{number}", store)
    number = str(store.add("distill/starts", 1))
    waited_for, told, since, said = set(range(1, world)), set(), time.monotonic(), False
    while waited_for:
        for one in waited_for:
            # The question may be that of an earlier start, so it is asked for until the rank knows.
            question = f"distill/asks/{one}"
            asked = store.get(question).decode() if store.check([question]) else None
            if asked is not None and asked not in told:
                store.set(f"distill/told/{asked}", number)
                told.add(asked)
        waited_for = {one for one in waited_for if not store.check([f"distill/knows/{number}/{one}"])}
        waited = time.monotonic() - since
        if waited_for and waited > patience.total_seconds():
            raise Unreachable(_not_heard_of(f"the host of rank {min(waited_for)}", patience))
        if waited_for and not said and waited > _NAME_AFTER.total_seconds():
            print(f"distill: waiting for the host of rank {min(waited_for)}", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.02)
    return dist.PrefixStore(f"start/{number}", store)


def _not_heard_of(host: str, patience: timedelta) -> Problem:
    wrong = f"not heard of for {patience.total_seconds() / 60:.0f} minutes"
    return Absence("host", host, wrong, "see what its ranks print, and whether it is up")


def _hosts_by_rank(world: int) -> list[str | None]:
    """The hostfile's name for each rank's host: DeepSpeed starts ranks with that on its own command line only."""
    launcher = deepspeed_launcher()
    for argument in launcher.cmdline() if launcher else []:
        if argument.startswith("--world_info="):
            slots = json.loads(base64.urlsafe_b64decode(argument.partition("=")[2]))
            names = [host for host, ranks in slots.items() for _ in ranks]
            return names if len(names) == world else [None] * world
    return [None] * world


def _waits(wait: Callable[[], object]) -> bool:
    try:
        wait()
    except dist.DistStoreError:
        return False
    return True


def _nothing() -> None:
    return None


def _told(problem: Problem) -> list[str]:
    return [problem.field, repr(problem.value), problem.wrong, problem.mend]


class _Quoted(str):
    """A value whose repr has come over the wire."""

    def __repr__(self) -> str:
        return str(self)


def _differences(facts: dict[str, dict[str, str]]) -> list[Problem]:
    first, *others = facts
    problems = []
    for host in others:
        ours, theirs = facts[first], facts[host]
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names:
            listed = "; ".join(_difference(name, theirs.get(name), ours.get(name)) for name in names[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            wrong = f"differs from {first} in {listed}{more}"
            problems.append(Problem("host", host, wrong, "make code, packages, models and data the same on all hosts"))
    return problems


def _difference(name: str, theirs: str | None, ours: str | None) -> str:
    return f"{name} ({theirs or 'absent'}, not {ours or 'absent'})"
