"""What stays on disk: the newest checkpoints, and never a leftover in the place of a good one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint
from distill.checkpoint import RunState
from distill.topology import Topology


class NoWeights:
    """Stands for an engine whose own files do not matter here."""

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag / "weights").write_text("x")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Topology:
    monkeypatch.setattr(Topology, "barrier", lambda self: None)
    return Topology(0, 1, 1, torch.device("cpu"), None, None)


def save(folder: Path, step: int, alone: Topology, keep: int) -> None:
    engine: Any = NoWeights()
    checkpoint.save(folder, RunState(step=step), engine, None, alone, keep)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_the_newest_are_kept(tmp_path: Path, alone: Topology) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, alone, keep=2)
    assert kept(tmp_path) == ["step-0000003", "step-0000004"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.tag, found.state.step, found.world_size) == ("step-0000004", 4, 1)


@pytest.mark.parametrize("leftover", ["step-0000009", "step-0000009.partial", "step-0000005.partial"])
def test_what_a_kill_left_behind_never_pushes_out_a_good_one(tmp_path: Path, alone: Topology, leftover: str) -> None:
    save(tmp_path, 4, alone, keep=1)
    (tmp_path / "checkpoints" / leftover).mkdir()
    save(tmp_path, 6, alone, keep=1)
    assert kept(tmp_path) == ["step-0000006"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.state.step == 6
