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
        notes = _notes(file)
    shards.take_notes(notes, _same(notes["counts"]))
    shards.publish()


def restore_reshaped(shards: Shards, paths: Sequence[Path]) -> None:
    """Load what ranks of another layout wrote to `paths`: of each parameter, what this rank holds of it. Collective."""
    files = [_open(path) for path in paths]
    notes = [_notes(file) for file in files]
    where: dict[str, list[tuple[Any, Segment]]] = {}
    for file, its in zip(files, notes, strict=True):
        for fields in its["segments"]:
            segment = Segment(*fields)
            where.setdefault(segment.name, []).append((file, segment))
    flats: dict[tuple[int, str], Tensor] = {}
    for segment in shards.segments:
        found = where[segment.name]
        pieces = next((its["parts"][segment.name] for its in notes if segment.name in its["parts"]), None)
        for kind in _kinds(*found[0]):
            whole = _whole(found, kind, Parts(pieces) if pieces else None)
            now = shards.parts(segment.name)
            ours = now.part(whole, segment.part) if now else whole
            flat = flats.setdefault((segment.flat, kind), torch.zeros(shards.flats[segment.flat].numel()))
            flat[segment.offset : segment.offset + segment.length] = ours[
                segment.start : segment.start + segment.length
            ]
    for (index, kind), flat in flats.items():
        shards.put(index, kind, flat.view(shards.flats[index].shape))
    for index in range(len(shards.flats)):
        for kind, value in _step_counts(files[0]).items():
            shards.put(index, kind, value)
    shards.take_notes(notes[0], _same(notes[0]["counts"]))
    shards.publish()


def _whole(found: list[tuple[Any, Segment]], kind: str, parts: Parts | None) -> Tensor:
    """A parameter, or a moment of it, flattened, of the segments that all ranks hold."""
    sizes = parts.sizes() if parts else [max(segment.start + segment.length for _, segment in found)]
    flattened = [torch.empty(size) for size in sizes]
    for file, segment in found:
        held = file.get_slice(f"{segment.flat}.{kind}")
        if len(held.get_shape()) == 1:
            values = held[segment.offset : segment.offset + segment.length]
        else:
            values = held[:].flatten()  # a parameter by itself
        flattened[segment.part][segment.start : segment.start + segment.length] = values
    return parts.whole(flattened) if parts else flattened[0]


def _kinds(file: Any, segment: Segment) -> list[str]:
    """fp32 and the moments: what a flat tensor has of its own size."""
    names = [name for name in file.keys() if name.startswith(f"{segment.flat}.")]  # noqa: SIM118
    return [name.partition(".")[2] for name in names if file.get_slice(name).get_shape()]


def _step_counts(file: Any) -> dict[str, Tensor]:
    """AdamW's counts of steps, where they are tensors: the same for all."""
    names = [name for name in file.keys() if not file.get_slice(name).get_shape()]  # noqa: SIM118
    return {name.partition(".")[2]: file.get_tensor(name) for name in names}


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _notes(file: Any) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads(file.metadata()["notes"])
    return notes


def _same(counts: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(count == counts[0] for count in counts), "AdamW counts the same steps for all"
    return counts[0]
