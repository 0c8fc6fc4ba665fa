"""A rank's shards of the student and its optimizer as one safetensors file, and the way back on any layout of ranks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distill.checkpoint.writer import TensorFile
from distill.shards import Parts, Segment, Shards
from distill.whereabouts import here


def shard_file(rank: int) -> str:
    """A rank's part of the student, its optimizer and its schedule."""
    return f"shard-{rank}.safetensors"


def content(shards: Shards) -> TensorFile:
    """What goes into it."""
    return TensorFile(shards.tensors(), {"notes": json.dumps(shards.notes())})


def fits(shards: Shards, path: Path) -> bool:
    """Whether the file cuts the student into flat tensors as this rank does."""
    try:
        with _open(path) as file:
            return [Segment(*fields) for fields in _notes(file)["segments"]] == shards.segments
    except FileNotFoundError:
        return False


def restore_same(shards: Shards, path: Path) -> None:
    """Load what this rank wrote on the same layout: every bit, padding included. Collective."""
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            index, _, kind = name.partition(".")
            shards.put(int(index), kind, file.get_tensor(name))
            here.tick()
        notes = _notes(file)
    shards.take_notes(notes)
    shards.publish()


def restore_reshaped(shards: Shards, paths: Sequence[Path]) -> None:
    """Load what ranks of another layout wrote to `paths`: of each parameter, what this rank holds of it. Collective."""
    written = Written(paths)
    for index, flat in enumerate(shards.flats):
        ours = [segment for segment in shards.segments if segment.flat == index]
        for kind in written.kinds:
            values = torch.zeros(flat.numel())
            for segment in ours:
                end = segment.offset + segment.length
                values[segment.offset : end] = written.elements(segment, kind, shards.parts(segment.name))
                here.tick()
            shards.put(index, kind, values.view(flat.shape))
    shards.take_notes(written.notes)
    shards.publish()


class Written:
    """The shards of all ranks of another layout; only what is asked for is read."""

    def __init__(self, paths: Sequence[Path]):
        files = [_open(path) for path in paths]
        every = [_notes(file) for file in files]
        self.notes = every[0]
        self.kinds = sorted({name.partition(".")[2] for name in files[0].keys()})  # noqa: SIM118
        """fp32 and the moments."""
        self._parts = {name: Parts(pieces) for notes in every for name, pieces in notes["parts"].items()}
        # What replicas hold alike is read once.
        self._held: dict[str, dict[tuple[int, int], tuple[Any, Segment]]] = {}
        for file, notes in zip(files, every, strict=True):
            for segment in (Segment(*fields) for fields in notes["segments"]):
                self._held.setdefault(segment.name, {})[segment.part, segment.start] = file, segment

    def elements(self, segment: Segment, kind: str, parts: Parts | None) -> Tensor:
        """What a segment holds, of a layout that has dealt out the parameter as `parts`."""
        stop, before = segment.start + segment.length, self._parts.get(segment.name)
        if before is None and parts is None:
            return self._range(segment.name, kind, 0, segment.start, stop)
        if before is None:
            whole = self._range(segment.name, kind, 0, 0, self._size(segment.name))
        else:
            sizes = enumerate(before.sizes())
            whole = before.whole([self._range(segment.name, kind, part, 0, size) for part, size in sizes])
        return (parts.part(whole, segment.part) if parts else whole)[segment.start : stop]

    def _size(self, name: str) -> int:
        return max(segment.start + segment.length for _, segment in self._held[name].values())

    def _range(self, name: str, kind: str, part: int, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a part of a parameter."""
        values, found = torch.empty(stop - start), 0
        for file, held in self._held[name].values():
            first, last = max(start, held.start), min(stop, held.start + held.length)
            if held.part == part and first < last:
                tensor, shift = file.get_slice(f"{held.flat}.{kind}"), held.offset - held.start
                # A tensor of more than one dimension is one parameter, and whole.
                flat = tensor if len(tensor.get_shape()) == 1 else tensor[:].flatten()
                values[first - start : last - start] = flat[first + shift : last + shift]
                found += last - first
        if found != stop - start:
            raise RuntimeError(f"the checkpoint holds {found} of {stop - start} elements of {name}")
        return values


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _notes(file: Any) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads(file.metadata()["notes"])
    return notes
