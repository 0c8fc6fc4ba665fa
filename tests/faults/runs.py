"""What is left of a broken run, and whether the run that went on from it equals one that was never broken."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from ledger import Fault
from safetensors.torch import load_file

from distill.checkpoint.catalog import CHECKPOINTS, Damaged, candidates, read
from distill.checkpoint.disk import wrong_with

_TIMINGS = ("time/", "memory/", "tokens/per_second")


def figures(run: Path) -> list[dict]:
    """All records but for what a clock has said."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(_TIMINGS)} for line in lines]


def last_step(run: Path) -> int:
    """The last one that was logged; a line may be cut off."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def newest_whole(run: Path) -> int:
    """The step of the checkpoint that the run would go on from, every byte of it checked; 0 if there is none."""
    root = run / CHECKPOINTS
    for tag in candidates(root):
        try:
            found = read(root, tag)
        except Damaged:
            continue
        if not any(wrong_with(root / tag / name, record) for name, record in found.files.items()):
            return found.state.step
    return 0


def same_tensors(ours: Path, theirs: Path) -> bool:
    """Whether two safetensors files hold the same bits."""
    one, other = load_file(ours), load_file(theirs)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def differences(run: Path, whole: Path, but_checkpoints: bool = False) -> list[str]:
    """In what a run differs from one that was never broken: records, sampled text, weights, the last checkpoint."""
    found = []
    if figures(run) != figures(whole):
        found.append("metrics.jsonl")
    if _samples(run) != _samples(whole):
        found.append("samples.jsonl")
    if not same_tensors(run / "student/model.safetensors", whole / "student/model.safetensors"):
        found.append("the student")
    if but_checkpoints:
        return found
    tag = candidates(whole / CHECKPOINTS)[0]
    for file in sorted((whole / CHECKPOINTS / tag).glob("*.safetensors")):
        if not same_tensors(run / CHECKPOINTS / tag / file.name, file):
            found.append(file.name)
    return found


def _samples(run: Path) -> str:
    path = run / "samples.jsonl"
    return path.read_text() if path.exists() else ""


def note_end(fault: Fault, seconds: float, orphans: bool) -> None:
    """What every broken life is asked."""
    fault.injected += 1
    fault.seconds.append(seconds)
    fault.orphans += orphans


def note_loss(fault: Fault, run: Path, before: int) -> int:
    """Count the steps to be done again, and a checkpoint that was there `before` and is not; the newest now."""
    now = newest_whole(run)
    fault.steps_lost.append(max(last_step(run) - now, 0))
    fault.lost += now < before
    return now


def note_comparison(faults: Iterable[Fault], run: Path, whole: Path, but_checkpoints: bool = False) -> list[str]:
    """Compare a run that went on to its end."""
    found = differences(run, whole, but_checkpoints)
    for fault in faults:
        fault.not_bit_exact += bool(found)
    return found
