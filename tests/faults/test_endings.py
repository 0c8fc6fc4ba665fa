"""Real ranks, broken on purpose: how fast all of them end, what they say last, and that the numbers go on."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken_run import BrokenRun, Ending

pytestmark = pytest.mark.slow

TIMINGS = ("time/", "memory/", "tokens/per_second")
# All ranks must have ended so long after a fault is seen.
LIMIT = 30.0


@pytest.fixture
def start(
    environment: dict, free_port: Callable[[], int], root: Path, tmp_path: Path
) -> Iterator[Callable[..., BrokenRun]]:
    """Launch two ranks of `script` with arguments for it, and flags for the launch."""
    runs: list[BrokenRun] = []

    def begin(*arguments: str, script: str = "launch/train.sh", flags: tuple[str, ...] = ()) -> BrokenRun:
        port = free_port()
        layout = ["--num_accelerators", "2", "--master_port", str(port), *flags]
        head = ["bash", script, *layout] if script == "launch/train.sh" else _launcher(layout, script)
        log = tmp_path / f"log-{len(runs)}"
        runs.append(BrokenRun([*head, *arguments], root, environment, log, port))
        return runs[-1]

    yield begin
    for run in runs:
        run.clear()


def _launcher(layout: list[str], script: str) -> list[str]:
    return ["python", "-m", "distill.launching", *layout, script]


@pytest.fixture
def recipe(models_dir: Path, records_dir: Path, tmp_path: Path) -> Callable[[str], str]:
    def write(name: str) -> str:
        config: dict[str, Any] = {
            "run": {"folder": str(tmp_path / name), "seed": 5},
            "student": {"path": str(models_dir / "student")},
            "teacher": {"path": str(models_dir / "teacher")},
            "data": {"train": str(records_dir / "train"), "valid": str(records_dir / "valid")},
            "objective": {"name": "minillm"},
            "precision": "fp32",
            "rollout": {"max_new_tokens": 12, "per_round": 16, "inner_epochs": 2, "batch": 8},
            "optim": {"lr": 5e-3, "batch_size": 8, "micro_batch": 2, "steps": 40, "schedule": "cosine"},
            "evaluation": {"every": 5, "prompts": 7},
            "checkpoint": {"every": 3},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


def records(run: Path, until: int) -> list[dict]:
    """All figures but timings, of the steps before `until`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows if row["step"] < until]


def check(ending: Ending, code: int, *told: str, seconds: float = LIMIT) -> None:
    assert ending.code == code, ending.text[-6000:]
    assert ending.seconds < seconds
    assert ending.orphans == []
    assert ending.port_free
    last = ending.told[-len(told) :]
    assert all(part in line for part, line in zip(told, last, strict=True)), ending.told
    # Of all lines too but for the few that DeepSpeed's launcher adds.
    assert last[-1] in ending.text.splitlines()[-8:]


def test_killed_preempted_and_hanging_a_run_goes_on_to_the_same_numbers(
    start: Callable[..., BrokenRun], recipe: Callable[[str], str], tmp_path: Path
) -> None:
    """And an exception in another run, which until then is what this one must be like."""
    broken = "tests/ranks/broken.py"
    other = start("raises", "1", "30", "--config", recipe("whole"), script=broken)
    other.wait_for_step(tmp_path / "whole/metrics.jsonl", 29)
    ending = other.end(other.now())
    check(ending, 1, "rank 1 (", "to resume: python -m distill.launching --num_accelerators 2")
    assert "failed at step 30 in forward: ZeroDivisionError: broken on purpose" in ending.told[-2]
    assert ending.text.count("Traceback") == 1, "not of the connection that it broke"

    config = recipe("run")
    metrics = tmp_path / "run/metrics.jsonl"
    run = start("--config", config, flags=("--max-restarts", "1"))
    run.wait_for_step(metrics, 4)
    ranks = run.ranks()
    since = run.strike(ranks[1])
    run.wait_until(lambda: not any(rank.is_running() for rank in ranks.values()), LIMIT)
    assert run.now() - since < LIMIT
    run.wait_until(lambda: "resumed" in run.text())
    ending = run.end(run.strike(number=signal.SIGTERM))
    resume = f"to resume: bash launch/train.sh --num_accelerators 2 --master_port {run.port} --max-restarts 1"
    check(ending, 75, "distill: told to stop, saved at step ")
    assert resume in ending.told[-1]
    killed, command, again = ending.told[:3]
    assert "distill: rank 1 (" in killed
    assert ") was killed" in killed
    assert " at step " in killed
    assert resume in command
    assert again.endswith("starting again (1 of 1)")

    hanging = start("hangs", "1", "25", "--config", config, "fault.stall_timeout=10", script=broken)
    hanging.wait_for_step(metrics, 24)
    ending = hanging.end(hanging.now())
    check(ending, 1, "distill: no progress for 1", "to resume: ", seconds=10 + LIMIT)
    assert "look at rank 1 (" in ending.told[-2]
    assert ": at step 25 in forward, not in a collective; " in ending.told[-2]
    for rank in range(2):
        stacks = (tmp_path / f"run/faults/stacks-rank-{rank}.txt").read_text()
        assert ("in broken\n" in stacks) == (rank == 1), "where it sleeps"
        assert f"stacks of rank {rank} (" in ending.text
    assert records(tmp_path / "run", 25) == records(tmp_path / "whole", 25)
    assert len(records(tmp_path / "run", 25)) == 24 + 4, "each step once, and validations"
