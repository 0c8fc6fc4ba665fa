"""Saving a run so that the same command continues it, and the student as a Hugging Face folder.

Everything is written beside its place and renamed into it when complete; `latest` moves last. A kill at any moment
leaves the previous checkpoint whole.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from distill.data.batches import Rollouts
from distill.data.folders import replace_folder
from distill.engine import Engine
from distill.errors import BadInput, Problem
from distill.topology import Topology

CHECKPOINTS, LATEST, STATE, STUDENT = "checkpoints", "latest", "state.json", "student"


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Data order, coins and token draws follow from `step` and the seed."""

    step: int = 0
    """Optimizer steps finished."""
    seconds: float = 0.0
    """Training time so far, evaluation and saving excluded."""
    best: float | None = None
    """Best validation figure so far."""
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    """What `source`, `objective` and `updater` have learnt or counted."""
    wandb_id: str | None = None


def save(
    folder: Path, state: RunState, student: Engine, rollouts: Rollouts | None, topology: Topology, keep: int
) -> None:
    """Write a checkpoint of the run in `folder`. Collective."""
    root = folder / CHECKPOINTS
    tag = f"step-{state.step:07d}"
    partial = f"{tag}.partial"
    if topology.is_writer:
        shutil.rmtree(root / partial, ignore_errors=True)
        (root / partial).mkdir(parents=True)
    topology.barrier()
    student.save(root, partial)
    if rollouts is not None:
        save_file(
            {k: v.contiguous() for k, v in rollouts.tensors().items()},
            root / partial / f"rollouts-{topology.rank}.safetensors",
        )
    rng = {"cpu": torch.get_rng_state(), "device": get_accelerator().get_rng_state()}
    torch.save(rng, root / partial / f"rng-{topology.rank}.pt")
    topology.barrier()
    if topology.is_writer:
        content = {"state": vars(state), "world_size": topology.world_size, "tp_size": topology.tp_size}
        _write(root / partial / STATE, json.dumps(content))
        shutil.rmtree(root / tag, ignore_errors=True)
        (root / partial).rename(root / tag)
        _write(root / LATEST, tag)
        # A later step than this can only be left over from before a kill: it is not what `latest` led to.
        older = sorted(path for path in root.glob("step-*") if path.name < tag and not path.suffix)
        keeping = {tag, *(path.name for path in older[len(older) - keep + 1 :])}
        for folder_found in root.glob("step-*"):
            if folder_found.name not in keeping:
                shutil.rmtree(folder_found)
    topology.barrier()


@dataclass(frozen=True)
class Found:
    """A complete checkpoint and the layout of ranks that wrote it."""

    tag: str
    state: RunState
    world_size: int
    tp_size: int


def latest(folder: Path) -> Found | None:
    """The newest complete checkpoint; None for a run that never saved.

    Raises:
        BadInput: `latest` names a checkpoint that is not there.
    """
    pointer = folder / CHECKPOINTS / LATEST
    if not pointer.exists():
        return None
    tag = pointer.read_text(encoding="utf-8").strip()
    state = folder / CHECKPOINTS / tag / STATE
    if not state.is_file():
        wrong = f"its latest checkpoint {tag!r} is not there"
        raise BadInput(
            Problem("run.folder", str(folder), wrong, f"name a complete one in {pointer}, or remove the folder")
        )
    saved = json.loads(state.read_text(encoding="utf-8"))
    return Found(tag, RunState(**saved["state"]), saved["world_size"], saved["tp_size"])


def restore(folder: Path, tag: str, student: Engine, topology: Topology) -> Rollouts | None:
    """Load weights, optimizer, schedule and RNG; hand back this rank's rollouts, on the host. Collective."""
    root = folder / CHECKPOINTS
    student.load(root, tag)
    rng = torch.load(root / tag / f"rng-{topology.rank}.pt", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    get_accelerator().set_rng_state(rng["device"])
    path = root / tag / f"rollouts-{topology.rank}.safetensors"
    return Rollouts(**load_file(path)) if path.exists() else None


def write_student(folder: Path, student: Engine, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Put the student into `folder/student` as a Hugging Face model, replacing what is there at once. Collective."""
    weights = student.state_dict()
    if student.topology.is_writer:
        partial, final = folder / f"{STUDENT}.partial", folder / STUDENT
        shutil.rmtree(partial, ignore_errors=True)
        student.module.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        replace_folder(partial, final)
    student.topology.barrier()


def _write(path: Path, text: str) -> None:
    """Replace a small file at once, on disk before its name."""
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
