"""What must be the same on all hosts of a run, in short: code, packages, settings, models and data."""

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distill.checkpoint.catalog import CHECKPOINTS, LATEST
from distill.config import Config, dump

_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "datasets",
    "numpy",
    "pydantic",
)
_ROOT = Path(__file__).resolve().parent.parent
# A file longer than this is told by its name and length: weights and records would take minutes to read.
_READ_BYTES = 2**20


def fingerprint(config: Config) -> dict[str, str]:
    """A short hash or a version for each part, by name; equal dictionaries on two hosts mean equal runs there.

    A model named by its hub id is not here: all hosts are given one revision of it.
    """
    facts = {"python": platform.python_version()}
    facts |= {name: _version(name) for name in _PACKAGES}
    code = [*sorted((_ROOT / "distill").rglob("*.py")), _ROOT / "launch/train.sh"]
    facts |= {str(path.relative_to(_ROOT)): _hash([path.read_bytes()]) for path in code if path.is_file()}
    facts["the settings"] = _hash([dump(config).encode()])
    # A folder that is not shared would let one host go on from a checkpoint and another begin.
    latest = Path(config.run.folder) / CHECKPOINTS / LATEST
    facts["the latest checkpoint in run.folder"] = (
        latest.read_text(errors="replace").strip() if latest.is_file() else "none"
    )
    data = config.data
    named = {"data.train": data.train, "data.valid": data.valid, "data.plain_text": data.plain_text}
    named |= {"parallel.deepspeed": config.parallel.deepspeed, "student.path": Path(config.student.path)}
    if config.teacher:
        named["teacher.path"] = Path(config.teacher.path)
    facts |= {name: _hash(_content(path)) for name, path in named.items() if path is not None and path.exists()}
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _content(path: Path) -> Iterable[bytes]:
    """A file, or the files of a folder: name, length and, if short, what is in them."""
    files = sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        yield f"{file.name} {size}\n".encode()
        if size <= _READ_BYTES:
            yield file.read_bytes()


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]
