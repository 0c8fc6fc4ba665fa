"""What a run folder holds to continue from: which checkpoints, in which order to trust them, which may go.

`checkpoints/step-N/` appears whole, by a rename; its `manifest.json` names every file in it with size and checksum, and
itself has one. `latest` names the newest and moves last. Nothing here is collective.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.checkpoint.disk import FileRecord, replace_file, wrong_size

CHECKPOINTS, LATEST, MANIFEST = "checkpoints", "latest", "manifest.json"
PARTIAL, DAMAGED, GONE, RESHAPED = ".partial", ".damaged", ".gone", ".universal"
_FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Data order, coins and token draws follow from `step` and the seed."""

    step: int = 0
    """Optimizer steps finished."""
    seconds: float = 0.0
    """Training time so far, evaluation and saving excluded."""
    best: float | None = None
    """Best validation score so far: the figure that students are chosen by, negated where less is better."""
    best_step: int | None = None
    """The step that it was found after."""
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the parts of the run have learnt or counted, by their names."""


@dataclass(frozen=True)
class Found:
    """A checkpoint as its manifest describes it, and the layout of ranks that wrote it."""

    tag: str
    state: RunState
    world_size: int
    tp_size: int
    files: dict[str, FileRecord]


class Damaged(Exception):
    """A checkpoint that cannot be used; says why."""


def tag_of(step: int) -> str:
    """The folder's name."""
    return f"step-{step:07d}"


def candidates(root: Path) -> list[str]:
    """The checkpoints in `root` to go on from, best first: the one `latest` names, then those before it.

    A later one is a leftover: killed between the checkpoint's name and `latest`, the run has gone on from the earlier.
    Without a readable `latest` any will do.
    """
    tags = sorted((path.name for path in root.glob("step-*") if path.is_dir() and not path.suffix), reverse=True)
    try:
        newest = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        newest = ""
    if not newest.startswith("step-"):
        return tags
    return [newest, *(tag for tag in tags if tag < newest)]


def read(root: Path, tag: str) -> Found:
    """A checkpoint's manifest, and the sizes of its files.

    Raises:
        Damaged: it is not there, not whole, or was written by another version.
        OSError: it cannot be read now, which says nothing of what it holds.
    """
    try:
        text = (root / tag / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        content = manifest["content"]
        if manifest["format"] != _FORMAT:
            raise Damaged(f"{MANIFEST} has format {manifest['format']!r}, this version reads {_FORMAT}")
        if manifest["sha256"] != _checksum(content):
            raise Damaged(f"{MANIFEST} is not what was written (checksum)")
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        found = Found(tag, RunState(**content["state"]), content["world_size"], content["tp_size"], files)
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} is not whole") from None
    for name, record in files.items():
        if (wrong := wrong_size(root / tag / name, record)) is not None:
            raise Damaged(wrong)
    return found


def newest(folder: Path) -> tuple[Found | None, dict[str, str]]:
    """The newest checkpoint of the run in `folder` that looks whole, and what is wrong with those tried before it."""
    damaged: dict[str, str] = {}
    root = folder / CHECKPOINTS
    for tag in candidates(root):
        try:
            return read(root, tag), damaged
        except Damaged as error:
            damaged[tag] = str(error)
    return None, damaged


def publish(root: Path, found: Found) -> None:
    """Turn `TAG.partial`, whose files are on disk, into checkpoint TAG, and point `latest` to it."""
    content: dict[str, Any] = {
        "state": asdict(found.state),
        "world_size": found.world_size,
        "tp_size": found.tp_size,
        "files": {name: asdict(record) for name, record in sorted(found.files.items())},
    }
    manifest = {"format": _FORMAT, "sha256": _checksum(content), "content": content}
    partial, final = root / (found.tag + PARTIAL), root / found.tag
    replace_file(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    if final.exists():
        remove(final)  # a leftover: `latest` names another
    partial.rename(final)
    replace_file(root / LATEST, found.tag.encode())


def prune(root: Path, newest_tag: str, keep: int, best_step: int | None) -> None:
    """Keep the newest `keep` checkpoints up to `newest_tag` and the best one; remove the rest and all leftovers."""
    tags = sorted(path.name for path in root.glob("step-*") if path.is_dir() and not path.suffix)
    kept = {tag for tag in tags if tag <= newest_tag}
    kept = set(sorted(kept)[-keep:]) | ({tag_of(best_step)} if best_step is not None else set())
    for tag in tags:
        if tag not in kept:
            remove(root / tag)
    remove_leftovers(root)


def remove(folder: Path) -> None:
    """Remove a checkpoint: its name first, so that no part of it is ever taken for the whole."""
    gone = folder.with_name(folder.name + GONE)
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove what a kill has left of writing, removing and reshaping."""
    for path in root.glob("step-*"):
        if path.suffix in (PARTIAL, GONE, RESHAPED):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(root: Path, tag: str) -> None:
    """Take a damaged checkpoint out of the row, for people to look at."""
    aside = root / (tag + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    if (root / tag).exists():
        (root / tag).rename(aside)


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
