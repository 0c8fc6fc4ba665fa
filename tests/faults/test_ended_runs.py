"""One rank in trouble: all end at once, say where it was, and the run goes on; being told to stop loses nothing."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broken_run import BrokenRun, Ending
from ledger import Fault, Ledger
from lives import Nursery

from runs import last_step, newest_whole, note_comparison, note_end, note_loss

# All ranks must have ended so long after a fault is seen.
LIMIT = 30.0
PHASES = (("forward", 1), ("minibatch", 3), ("backward", 3), ("save", 4), ("validation", 4), ("optimizer", 7))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["kill", "raise"])
def test_one_rank_ends_all(
    how: str, victim: int, recipe: Callable, nursery: Nursery, ledger: Ledger, tmp_path: Path
) -> None:
    whole, broken = recipe(tmp_path / "whole", "minillm"), recipe(tmp_path / "broken", "minillm")
    nursery.live(whole).must_end(0, 0)
    what = {"kill": "killed", "raise": "raises an exception"}[how]
    fault, run, newest = ledger[f"rank {victim} {what} in a phase"], tmp_path / "broken/run", 0
    for phase, step in PHASES:
        life = nursery.live(broken, order={"rank": victim, "how": how, "phase": phase, "step": step})
        assert life.codes[victim] == {"kill": -9, "raise": 1}[how], life.said[-3000:]
        assert life.codes[1 - victim] not in (0, 2, 75), life.said[-3000:]
        assert life.seconds < LIMIT
        note_end(fault, life.seconds, life.orphans)
        newest = note_loss(fault, run, newest)
        told = [line for line in life.said.splitlines() if line.startswith("distill: rank ")]
        assert f"distill: rank {victim} (" in told[-1], life.said[-3000:]
        if how == "raise":
            assert f" failed at step {step} in {phase}: ZeroDivisionError" in told[-1], told
        else:
            # A killed rank has said last where it was up to a quarter of a second ago.
            assert re.search(
                rf"was killed \(SIGKILL\) (at step ({step - 1}|{step})|before the first step)", told[-1]
            ), told
    last = nursery.live(broken)
    fault.corrupted += last.codes != [0, 0]
    assert last.codes == [0, 0], last.said[-3000:]
    assert not note_comparison([fault], run, tmp_path / "whole/run")
    assert fault.lost == fault.orphans == 0


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_told_to_stop_nothing_is_lost(
    number: str, recipe: Callable, nursery: Nursery, ledger: Ledger, tmp_path: Path
) -> None:
    whole, broken = recipe(tmp_path / "whole", "minillm"), recipe(tmp_path / "broken", "minillm")
    nursery.live(whole).must_end(0, 0)
    fault, run, newest = ledger[f"told to stop by {number}"], tmp_path / "broken/run", 0
    for phase, step in (("forward", 1), ("minibatch", 3), ("optimizer", 4), ("backward", 6), ("validation", 4)):
        life = nursery.live(broken, order={"rank": step % 2, "how": number, "phase": phase, "step": step})
        if life.codes == [0, 0]:
            continue  # past the step: it has been told, stopped and gone on before
        assert life.codes == [75, 75], life.said[-3000:]
        note_end(fault, life.seconds, life.orphans)
        newest = note_loss(fault, run, newest)
        assert newest == last_step(run)
        assert f"told to stop, saved at step {newest}" in life.said
    assert fault.steps_lost == [0] * fault.injected
    last = nursery.live(broken)
    fault.corrupted += last.codes != [0, 0]
    assert last.codes == [0, 0], last.said[-3000:]
    assert not note_comparison([fault], run, tmp_path / "whole/run", but_checkpoints=True)


@pytest.fixture
def start(
    environment: dict, free_port: Callable[[], int], root: Path, tmp_path: Path
) -> Iterator[Callable[..., BrokenRun]]:
    """Launch two ranks as a user does, or of tests/ranks/broken.py."""
    runs: list[BrokenRun] = []

    def begin(config: Path, *arguments: str, fault: tuple[str, ...] = ()) -> BrokenRun:
        port = free_port()
        layout = ["--num_accelerators", "2", "--master_port", str(port)]
        user = ["bash", "launch/train.sh", *layout]
        broken = ["python", "-m", "distill.launching", *layout, "tests/ranks/broken.py", *fault]
        command = [*(broken if fault else user), "--config", str(config), *arguments]
        runs.append(BrokenRun(command, root, environment, tmp_path / f"log-{len(runs)}", port))
        return runs[-1]

    yield begin
    for run in runs:
        run.clear()


def note(fault: Fault, ending: Ending, run: Path, newest: int) -> int:
    """What is asked of every launch that a fault has ended."""
    note_end(fault, ending.seconds, bool(ending.orphans))
    assert ending.seconds < LIMIT, ending.text[-3000:]
    assert ending.port_free
    assert not ending.orphans
    return note_loss(fault, run, newest)


LONG = {"optim": {"steps": 60}, "evaluation": {"every": 0}, "checkpoint": {"every": 2}}


def test_launched_as_a_user_does(recipe: Callable, start: Callable, ledger: Ledger, tmp_path: Path) -> None:
    """The same run through all of them; then to the end."""
    whole, broken = recipe(tmp_path / "whole", "minillm", **LONG), recipe(tmp_path / "broken", "minillm", **LONG)
    ending = start(whole).end(BrokenRun.now())
    assert ending.code == 0, ending.text[-3000:]
    run, newest, step = tmp_path / "broken/run", 0, 0
    faults: list[Fault] = []

    def reach(launched: BrokenRun) -> None:
        nonlocal step
        step = last_step(run) + 5
        launched.wait_for_step(run / "metrics.jsonl", step)

    for name, victim in (("rank 0", 0), ("rank 1", 1), ("the launch", None)):
        launched = start(broken)
        reach(launched)
        struck = launched.strike(launched.ranks()[victim] if victim is not None else None)
        ending = launched.end(struck)
        assert ending.code not in (0, 2, 75)
        faults.append(ledger[f"launched: {name} killed"])
        newest = note(faults[-1], ending, run, newest)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        launched = start(broken)
        reach(launched)
        ending = launched.end(launched.strike(number=number))
        assert ending.code == 75, ending.text[-3000:]
        faults.append(ledger[f"launched: {number.name} to the launch"])
        newest = note(faults[-1], ending, run, newest)
        assert newest == last_step(run), "saved at the boundary"
    for kind, said in (("raises", "ZeroDivisionError"), ("memory", "out of memory"), ("hangs", "no progress")):
        step = last_step(run) + 5
        launched = start(broken, "fault.stall_timeout=8", fault=(kind, "1", str(step)))
        launched.wait_until(lambda launched=launched, said=said: said in launched.text())
        ending = launched.end(launched.now())
        assert ending.code == 1, ending.text[-3000:]
        assert f"at step {step}" in ending.text
        assert "to resume: " in ending.text
        faults.append(ledger[f"launched: rank 1 {kind}".replace("memory", "has no memory left")])
        newest = note(faults[-1], ending, run, newest)
    ending = start(broken).end(BrokenRun.now())
    assert ending.code == 0, ending.text[-3000:]
    assert not note_comparison(faults, run, tmp_path / "whole/run", but_checkpoints=True)
    assert newest_whole(run) == 60
