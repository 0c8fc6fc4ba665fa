"""Checkpoints that a disk has damaged: found, named, and passed over for the one before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ledger import Ledger
from lives import Nursery

from runs import newest_whole, note_comparison, note_end

FILES = ("manifest.json", *(f"{kind}-{rank}.safetensors" for kind in ("shard", "rng", "rollouts") for rank in (0, 1)))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], None]] = {"a bit flipped": flip, "cut short": truncate, "missing": Path.unlink}
POINTERS = {"empty": b"", "naming nothing": b"step-0009999", "no text": b"\xff\xfe\x00", "of another kind": b"global_7"}


@pytest.fixture(scope="module")
def killed(recipe: Callable, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run, and one killed in step 8 with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("damage")
    nursery.live(recipe(folder / "whole", "minillm")).must_end(0, 0)
    order = {"rank": 0, "how": "kill all", "phase": "optimizer", "step": 8}
    nursery.live(recipe(folder / "killed", "minillm"), order=order).must_end(-9, -9)
    assert newest_whole(folder / "killed/run") == 6
    return folder


@pytest.fixture
def broken(killed: Path, recipe: Callable, tmp_path: Path) -> Path:
    """The config of a copy of the killed run."""
    config: Path = recipe(tmp_path, "minillm")
    shutil.copytree(killed / "killed/run", tmp_path / "run")
    return config


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    name: str, damage: str, broken: Path, killed: Path, nursery: Nursery, ledger: Ledger
) -> None:
    run, fault = broken.parent / "run", ledger[f"newest checkpoint: a file {damage}"]
    DAMAGES[damage](run / "checkpoints/step-0000006" / name)
    life = nursery.live(broken)
    note_end(fault, 0.0, life.orphans)
    fault.steps_lost.append(8 - 4)
    fault.corrupted += life.codes != [0, 0]
    assert life.codes == [0, 0], life.said[-3000:]
    assert "step-0000006 cannot be used" in life.said
    assert name in life.said
    assert "resumed" in life.said
    assert "at step 4" in life.said
    assert not note_comparison([fault], run, killed / "whole/run")


@pytest.mark.parametrize("pointer", POINTERS)
def test_a_damaged_pointer_loses_nothing(
    pointer: str, broken: Path, killed: Path, nursery: Nursery, ledger: Ledger
) -> None:
    run, fault = broken.parent / "run", ledger["`latest` damaged"]
    (run / "checkpoints/latest").write_bytes(POINTERS[pointer])
    life = nursery.live(broken)
    note_end(fault, 0.0, life.orphans)
    fault.steps_lost.append(2)
    fault.corrupted += life.codes != [0, 0]
    assert life.codes == [0, 0], life.said[-3000:]
    assert "at step 6" in life.said
    assert not note_comparison([fault], run, killed / "whole/run")


def test_without_any_whole_checkpoint_the_run_is_refused_and_nothing_removed(
    broken: Path, nursery: Nursery, ledger: Ledger
) -> None:
    run, fault = broken.parent / "run", ledger["all checkpoints damaged"]
    for tag in ("step-0000004", "step-0000006"):
        flip(run / "checkpoints" / tag / "shard-1.safetensors")
    before = sorted(path.name for path in run.rglob("*"))
    for _ in range(2):
        life = nursery.live(broken)
        note_end(fault, 0.0, life.orphans)
        assert life.codes == [2, 2]
        assert life.said.count("none of its checkpoints is whole") == 1
        assert "Traceback" not in life.said
        assert sorted(path.name for path in run.rglob("*")) == before
    fault.compared = False
