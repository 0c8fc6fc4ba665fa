"""Runs that can be broken by the hundred, and the ledger of what came of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ledger import Ledger

_LEDGER = pytest.StashKey[Ledger]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEDGER] = Ledger()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ledger = config.stash[_LEDGER]
    if not ledger.faults:
        return
    ledger.write(config.rootpath / "runs" / "faults.json")
    terminalreporter.write_line("")
    terminalreporter.write_line(ledger.table())
    terminalreporter.write_line(json.dumps(ledger.figures()))


@pytest.fixture(scope="session")
def ledger(pytestconfig: pytest.Config) -> Ledger:
    return pytestconfig.stash[_LEDGER]


@dataclass(frozen=True)
class Life:
    """How a start of a run's ranks ended."""

    codes: list[int]
    """Exit codes by rank; negative: the signal."""
    seconds: float
    """From the first rank's end to the last's."""
    said: str
    orphans: bool


class Nursery:
    """Starts ranks in a second: tests/faults/nursery.py."""

    def __init__(self, root: Path, environment: dict[str, str], port: int):
        self.port = port
        # No thread in the process that is forked: not of Arrow's allocator, not of BLAS, not of OpenMP.
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        calm = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "TOKENIZERS_PARALLELISM": "false"}
        path = {"PYTHONPATH": f"{root}:{root / 'tests/faults'}"}
        self._process = subprocess.Popen(
            [sys.executable, str(root / "tests/faults/nursery.py")],
            cwd=root,
            env=environment | one | calm | path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def live(self, config: Path, *overrides: str, ranks: int = 2, order: dict | None = None) -> Life:
        """Start the ranks of a run, and wait until all have ended."""
        log = config.with_suffix(".log")
        log.write_text("")
        job = {"ranks": ranks, "arguments": ["--config", str(config), *overrides], "port": self.port, "log": str(log)}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job | {"break": order}) + "\n")
        self._process.stdin.flush()
        pids, ended = self._answer()["pids"], self._answer()
        return Life(ended["codes"], ended["seconds"], log.read_text(), _group_lives(pids[0]))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the nursery has ended"
        return dict(json.loads(line))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _group_lives(group: int) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)
        return True
    return False


@pytest.fixture(scope="session")
def nursery(root: Path, environment: dict[str, str], free_port: Callable[[], int]) -> Iterator[Nursery]:
    nursery = Nursery(root, environment, free_port())
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def recipe(models_dir: Path, records_dir: Path) -> Callable[..., Path]:
    """Writes the config of a small run that has everything in it, into a folder of its own."""

    def write(folder: Path, objective: str, **changes: dict[str, Any]) -> Path:
        config: dict[str, Any] = {
            "run": {"folder": str(folder / "run"), "seed": 5},
            "student": {"path": str(models_dir / "student")},
            "teacher": {"path": str(models_dir / "teacher")},
            "data": {"train": str(records_dir / "train"), "valid": str(records_dir / "valid")},
            "objective": {"name": objective},
            "precision": "fp32",
            "rollout": {"max_new_tokens": 12, "batch": 8},
            "optim": {"lr": 5e-3, "batch_size": 8, "micro_batch": 2, "steps": 8, "schedule": "cosine"},
            "evaluation": {"every": 4, "prompts": 8},
            "checkpoint": {"every": 2},
            "log": {"wandb": "disabled", "samples": 16},
        }
        if objective == "minillm":
            config["rollout"] |= {"per_round": 16, "inner_epochs": 2}
        if objective == "distillm":
            config["objective"] |= {"start": 0.5, "adapt_every": 2, "replay": 32}
            config["rollout"] |= {"alpha": 0.0}
        for section, values in changes.items():
            config[section] = config.get(section, {}) | values if isinstance(values, dict) else values
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        return folder / "run.yaml"

    return write
