"""Runs that can be broken by the hundred, and the ledger of what came of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ledger import Ledger
from lives import Nursery

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
        if objective in ("sft", "kd", "taid"):
            del config["rollout"]["batch"]
        if objective == "sft":
            del config["rollout"]
        for section, values in changes.items():
            config[section] = config.get(section, {}) | values if isinstance(values, dict) else values
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        return folder / "run.yaml"

    return write
