"""Two hosts for real, and the run that both of them train."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, missing

TIMINGS = ("time/", "memory/", "tokens/per_second")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Hosts `alpha` and `beta`."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as hosts:
        for name in ("alpha", "beta"):
            hosts.add(name)
        yield hosts


@pytest.fixture
def hostfile(tmp_path: Path) -> Callable[..., Path]:
    def write(*names: str) -> Path:
        path = tmp_path / "hosts"
        path.write_text("".join(f"{name} slots=1\n" for name in names))
        return path

    return write


def write_recipe(models_dir: Path, records_dir: Path, folder: Path, name: str) -> Path:
    """A few steps of MiniLLM, so that sampling, scoring, validation and saving all cross the hosts."""
    config: dict[str, Any] = {
        "run": {"folder": str(folder / name), "seed": 5},
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {"train": str(records_dir / "train"), "valid": str(records_dir / "valid")},
        "objective": {"name": "minillm"},
        "precision": "fp32",
        "rollout": {"max_new_tokens": 8, "per_round": 8, "inner_epochs": 2, "batch": 4},
        "optim": {"lr": 5e-3, "batch_size": 4, "micro_batch": 2, "steps": 4},
        "evaluation": {"prompts": 4},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def recipe(models_dir: Path, records_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: write_recipe(models_dir, records_dir, tmp_path, name)


def figures_of(run: Path) -> list[dict[str, float]]:
    """What a run has logged, but for its timings."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]


@pytest.fixture
def figures() -> Callable[[Path], list[dict[str, float]]]:
    return figures_of


@pytest.fixture(scope="session")
def of_one_host(
    models_dir: Path, records_dir: Path, launch: Callable, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    """The figures of two ranks on one host. One thread each: sums in another order are other numbers."""
    folder = tmp_path_factory.mktemp("one-host")
    launch(
        "launch/train.sh", "--config", str(write_recipe(models_dir, records_dir, folder, "one")), OMP_NUM_THREADS="1"
    )
    found = figures_of(folder / "one")
    assert len(found) == 5
    return found


@pytest.fixture
def begin_on_alpha(
    cluster: Cluster, environment: dict[str, str], root: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command on host alpha from the checkout, as a user who is logged in there; it is ended."""
    # What the launcher is to find out or to forward must not be here by chance.
    kept = {k: v for k, v in environment.items() if not k.startswith(("GLOO_", "NCCL_", "WANDB_", "HF_", "OMP_"))}
    begun: list[subprocess.Popen[str]] = []

    def begin(*command: str, **changes: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*cluster.on(cluster.hosts["alpha"]), *command],
            cwd=root,
            env=kept | {"PATH": cluster.path(environment["PATH"])} | changes,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield begin
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def on_alpha(
    begin_on_alpha: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command on host alpha to its end."""

    def run(*command: str, timeout: float = 300, **changes: str) -> subprocess.CompletedProcess[str]:
        process = begin_on_alpha(*command, **changes)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run
