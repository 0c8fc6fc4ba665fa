"""Which checkpoint a run goes on from, and what every rank takes from it, on whatever layout of ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from distill.checkpoint.catalog import (
    CHECKPOINTS,
    LATEST,
    Damaged,
    Found,
    candidates,
    read,
    remove_leftovers,
    set_aside,
)
from distill.checkpoint.disk import replace_file, wrong_with
from distill.checkpoint.shard_files import content, fits, restore_reshaped, restore_same, shard_file
from distill.checkpoint.tensor_file import TensorFile
from distill.data.batches import Rollouts, concatenate
from distill.engine import Engine
from distill.errors import BadInput, Problem
from distill.topology import Topology


def contents_of(student: Engine, rollouts: Rollouts | None, rank: int) -> dict[str, TensorFile]:
    """This rank's state of a run, by file name; its tensors are the live ones."""
    rng = {"cpu": torch.get_rng_state(), "device": get_accelerator().get_rng_state()}
    files = {shard_file(rank): content(student.shards), _rng_file(rank): TensorFile(rng)}
    return files if rollouts is None else files | {_rollouts_file(rank): TensorFile(rollouts.tensors())}


def _rng_file(rank: int) -> str:
    return f"rng-{rank}.safetensors"


def _rollouts_file(rank: int) -> str:
    return f"rollouts-{rank}.safetensors"


@dataclass
class Restorer:
    """Finds the newest checkpoint that is whole, and loads it; every rank holds one. Its methods are collective."""

    folder: Path
    topology: Topology
    say: Callable[[str], None]
    """Prints for rank 0."""

    @property
    def _root(self) -> Path:
        return self.folder / CHECKPOINTS

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole; each rank has read its share of the files. Damaged ones are set aside.

        Raises:
            BadInput: there are checkpoints, and all are damaged.
        """
        writer, root = self.topology.is_writer, self._root
        if writer:
            remove_leftovers(root)
        tags = self.topology.gather_objects(candidates(root))[0]
        damaged: dict[str, str] = {}
        for tag in tags:
            wrong = self._check(tag)
            if wrong is None:
                if writer and damaged:
                    self._pass_over(damaged, tag)
                return read(root, tag)
            damaged[tag] = wrong
        if damaged:
            wrong = f"none of its checkpoints is whole ({'; '.join(f'{tag}: {why}' for tag, why in damaged.items())})"
            raise BadInput(Problem("run.folder", str(self.folder), wrong, "put one back, or start in another folder"))
        return None

    def _pass_over(self, damaged: dict[str, str], tag: str) -> None:
        for other, wrong in damaged.items():
            self.say(f"checkpoint {other} cannot be used: {wrong}; it is set aside, the run goes on from {tag}")
            set_aside(self._root, other)
        replace_file(self._root / LATEST, tag.encode())

    def _check(self, tag: str) -> str | None:
        """What is wrong with a checkpoint; the same answer on every rank."""
        try:
            files = sorted(read(self._root, tag).files.items())
        except Damaged as damaged:
            wrong: str | None = str(damaged)
        else:
            ours = files[self.topology.rank :: self.topology.world_size]
            wrongs = (wrong_with(self._root / tag / name, record) for name, record in ours)
            wrong = next((wrong for wrong in wrongs if wrong is not None), None)
        return next((wrong for wrong in self.topology.gather_objects(wrong) if wrong is not None), None)

    def restore(self, found: Found, student: Engine) -> Rollouts | None:
        """Load weights, optimizer, schedule and RNG; hand back this rank's rollouts, on the host."""
        topology, folder = self.topology, self._root / found.tag
        same = (found.world_size, found.tp_size) == (topology.world_size, topology.tp_size)
        ours, shards = folder / shard_file(topology.rank), student.shards
        with student.reloaded():
            if all(topology.gather_objects(same and fits(shards, ours))):
                restore_same(shards, ours)
            else:
                if topology.is_writer:
                    self.say(f"{found.tag} is of {layout(found)}; it is dealt out anew to {layout(topology)}")
                restore_reshaped(shards, [folder / shard_file(rank) for rank in range(found.world_size)])
        if not same:
            return deal(rollouts_of(self._root, found), topology.dp_rank, topology.dp_size)
        rng = load_file(folder / _rng_file(topology.rank))
        torch.set_rng_state(rng["cpu"])
        get_accelerator().set_rng_state(rng["device"])
        path = folder / _rollouts_file(topology.rank)
        return _read_rollouts(path) if path.name in found.files else None


def layout(of: Found | Topology) -> str:
    """How a run is spread, in words."""
    return f"{of.world_size} ranks at TP {of.tp_size}"


def rollouts_of(root: Path, found: Found) -> list[Rollouts]:
    """Each replica's rollouts, on the host; none where the objective samples nothing."""
    files = [_rollouts_file(rank) for rank in range(0, found.world_size, found.tp_size)]
    return [_read_rollouts(root / found.tag / name) for name in files if name in found.files]


def _read_rollouts(path: Path) -> Rollouts:
    # Of their own: what the library gives is a view of the file, which may go while they are in use.
    return Rollouts(**{name: tensor.clone() for name, tensor in load_file(path).items()})


def deal(parts: list[Rollouts], dp_rank: int, dp_size: int) -> Rollouts | None:
    """A replica's rows of all replicas' rollouts. Row k of replica r of n is row k·n + r of all, on any layout."""
    if not parts:
        return None
    together = concatenate(parts)
    rows = torch.arange(len(together)).view(len(parts), -1).T.flatten()
    return together.rows(rows[dp_rank::dp_size])
