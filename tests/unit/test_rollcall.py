"""Hosts compare notes before they start: one verdict, heard by all, with the host's name in it."""

import base64
import copy
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from distill import rollcall
from distill.errors import BadInput, Problem, refusal
from distill.rollcall import RollCall

HOSTS = ["alpha", "alpha", "beta", "beta"]


@pytest.fixture
def call(free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run one function with every rank's roll; each rank's result or error, by rank."""
    monkeypatch.setattr(rollcall, "_NAME_AFTER", timedelta(seconds=0.3))

    def run(work: Callable[[RollCall], Any], ranks: tuple[int, ...] = (0, 1, 2, 3)) -> dict[int, Any]:
        port, results = free_port(), {}
        server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

        def one(rank: int) -> None:
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            try:
                results[rank] = work(RollCall(store, rank, [*HOSTS], speaker=rank % 2 == 0))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        del server
        return results

    return run


def lines(error: object) -> list[str]:
    assert isinstance(error, BadInput)
    return [str(problem) for problem in error.problems]


def refuse(field: str) -> None:
    raise BadInput(Problem(field, "/x y", "no such folder", "give another"))


def test_work_that_succeeds_everywhere_gives_its_results(call: Callable) -> None:
    assert call(lambda roll: roll.together(lambda: roll.rank * 10)) == {0: 0, 1: 10, 2: 20, 3: 30}


def test_a_problem_on_one_host_stops_all_and_rank_0_says_where(call: Callable) -> None:
    results = call(lambda roll: roll.together(lambda: refuse("data.train") if roll.rank > 1 else None))
    assert lines(results[0]) == ["data.train = '/x y': no such folder (on beta); give another"]
    assert [lines(results[rank]) for rank in (1, 2, 3)] == [[], [], []]


def test_a_problem_of_all_hosts_is_said_once(call: Callable) -> None:
    results = call(lambda roll: roll.together(lambda: refuse("--config")))
    assert lines(results[0]) == ["--config = '/x y': no such folder; give another"]


def test_other_hosts_wait_for_what_rank_0_finds(call: Callable) -> None:
    done: list[int] = []

    def work(roll: RollCall) -> None:
        def look() -> None:
            done.append(roll.rank)
            if roll.rank == 0:
                refuse("optim.batch_size")

        roll.in_turn(look)

    assert lines(call(work)[0]) == ["optim.batch_size = '/x y': no such folder; give another"]
    assert done == [0]


def test_the_first_rank_of_every_host_has_its_turn(call: Callable) -> None:
    done: list[int] = []
    call(lambda roll: roll.in_turn(lambda: done.append(roll.rank)))
    assert done == [0, 2]


def test_a_crash_keeps_its_traceback_and_the_others_hear_of_it(call: Callable) -> None:
    def crash(roll: RollCall) -> None:
        roll.together(lambda: {}["x"] if roll.rank == 2 else None)

    results = call(crash)
    assert isinstance(results[2], KeyError)
    assert lines(results[0]) == ["host = 'beta': stopped with KeyError; see its output"]


def test_hosts_that_differ_are_named_with_what_differs(call: Callable) -> None:
    facts = {"distill/a.py": "11", "torch": "2.13", "numpy": "2"}
    other = {"distill/a.py": "22", "torch": "2.13"}
    results = call(lambda roll: roll.compare(other if roll.rank > 1 else facts))
    (line,) = lines(results[0])
    assert "host = 'beta': differs from alpha in distill/a.py (22, not 11); numpy (absent, not 2);" in line
    assert lines(results[2]) == []
    assert call(lambda roll: roll.compare(facts)) == dict.fromkeys(range(4))
    assert call(lambda roll: roll.compare({})) == dict.fromkeys(range(4))


def test_a_host_that_does_not_come_is_named(
    call: Callable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    patience = timedelta(seconds=1)
    results = call(lambda roll: roll.together(lambda: None, patience), ranks=(0, 1))
    assert lines(results[0])[0].startswith("host = 'beta': not heard of for")
    assert "distill: waiting for beta" in capfd.readouterr().err


def test_a_start_does_not_heed_the_verdicts_of_another(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a second run is given the port of a first: its other hosts reach the first one's store."""
    monkeypatch.setenv("MASTER_ADDR", "alpha")
    monkeypatch.setenv("MASTER_PORT", "29500")

    def twice(roll: RollCall) -> list[str]:
        roll.enter()
        roll.together(lambda: None)
        again = RollCall(roll.store, roll.rank, [*HOSTS], roll.speaker)
        with pytest.raises(BadInput) as refused:
            again.enter()
        return lines(refused.value)

    for found in call(twice).values():
        assert found[0].startswith("--master_port = 'alpha:29500': another run listens there")


def test_it_is_said_before_any_rank_leaves(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun kills all ranks when the first one leaves."""
    happened: list[str] = []

    def tell(error: BadInput) -> None:
        time.sleep(1)
        happened.append(f"told {error}")

    def work(roll: RollCall) -> None:
        with pytest.raises(BadInput):
            roll.together(lambda: refuse("--config"))
        happened.append("left")

    monkeypatch.setattr(rollcall, "tell", tell)
    call(work)
    assert happened == ["told --config = '/x y': no such folder; give another", *["left"] * 4]


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A meeting point that each host finds on its loopback, and what interfaces were looked for."""
    asked: list[str] = []
    monkeypatch.setattr(rollcall, "address_towards", lambda host: None)
    monkeypatch.setattr(rollcall, "choose_interface", asked.append)
    monkeypatch.setenv("MASTER_ADDR", "alpha")
    return asked


def test_hosts_with_different_numbers_of_ranks_are_refused(call: Callable, loopback: list[str]) -> None:
    def greet(roll: RollCall) -> None:
        roll.hosts = ["alpha", "alpha", "alpha", None]  # the last tells itself
        roll.greet()

    assert lines(call(greet)[0])[0].startswith("host = 'alpha': alpha has 3 ranks, ")
    assert call(lambda roll: roll.greet()) == dict.fromkeys(range(4))
    assert loopback == ["alpha"] * 4


def test_the_first_host_hears_of_another(call: Callable, loopback: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a host's own name to its loopback: there is no way from there to the others."""
    addresses: dict[int, str | None] = {0: None, 1: None, 2: "10.0.0.2", 3: "10.0.0.2"}
    here = threading.local()
    monkeypatch.setattr(rollcall, "address_towards", lambda host: addresses[here.rank])

    def greet(roll: RollCall) -> None:
        here.rank = roll.rank
        roll.greet()

    assert call(greet) == dict.fromkeys(range(4))
    assert sorted(loopback) == ["10.0.0.2"] * 4 + ["alpha"] * 4


def test_agents_of_torchrun_that_count_differently_meet(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts what failed on its own host; its store keeps what an earlier start has left in it."""

    def start_again(roll: RollCall) -> bool:
        count = 1 if roll.rank > 1 else 0
        # A start of which some ranks had asked, and some been told, when it was ended.
        roll.store.set(f"distill/asks/{roll.rank}", f"earlier {roll.rank}")
        if roll.rank == 0:
            roll.store.add("distill/starts", 1)
            roll.store.set("distill/told/earlier 1", "1")
            roll.store.set("distill/knows/1/1", "")
        time.sleep(0.3 * count)
        whole = roll.store
        roll.store = rollcall._of_this_start(whole, roll.rank, len(HOSTS))
        roll.enter()
        roll.together(lambda: None)
        return whole.check([f"start/2/distill/here/{roll.rank}"])

    monkeypatch.setenv("MASTER_ADDR", "alpha")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert call(start_again) == dict.fromkeys(range(4), True)


def test_a_rank_of_torchrun_that_does_not_come_is_named(call: Callable) -> None:
    patience = timedelta(seconds=1)
    results = call(lambda roll: rollcall._of_this_start(roll.store, roll.rank, 4, patience), ranks=(0, 1, 3))
    assert lines(results[0])[0].startswith("host = 'the host of rank 2': not heard of for")


def test_names_come_from_the_launchers_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parent:
        def cmdline(self) -> list[str]:
            slots = base64.urlsafe_b64encode(json.dumps({"worker-1": [0, 1], "worker-2": [0]}).encode()).decode()
            return ["python", "-m", "deepspeed.launcher.launch", f"--world_info={slots}", "--node_rank=0"]

    monkeypatch.setattr(psutil.Process, "parent", lambda self: Parent())
    assert rollcall._hosts_by_rank(3) == ["worker-1", "worker-1", "worker-2"]
    assert rollcall._hosts_by_rank(2) == [None, None], "another launcher's"


def test_rank_0_has_as_many_files_as_it_may() -> None:
    text = (
        "import resource as r; from distill.rollcall import _allow_files; most = r.getrlimit(r.RLIMIT_NOFILE)[1]; "
        "r.setrlimit(r.RLIMIT_NOFILE, (64, most)); _allow_files(); assert r.getrlimit(r.RLIMIT_NOFILE)[0] == most"
    )
    subprocess.run([sys.executable, "-c", text], check=True)


def test_who_is_not_there_may_yet_come() -> None:
    absent = refusal([rollcall._not_heard_of("a", timedelta(minutes=5))])
    assert (absent.code, copy.copy(absent).code) == (1, 1)
    assert refusal([*absent.problems, Problem("a", 1, "wrong", "mend it")]).code == 2
