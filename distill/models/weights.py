"""Which files hold a model's weights, and whether they are whole; pickles only where they are asked for."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill.config import ModelSettings
from distill.errors import BadInput, Problem

# One file, or an index of several; in the order in which transformers looks for them.
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
_POINTER = b"version https://git-lfs"


def check_weights(folder: Path, settings: ModelSettings, field: str) -> dict[str, list[int]]:
    """See that all weights lie in `folder` and are whole; the shapes of those in safetensors, by name.

    Raises:
        BadInput: they are not, or are pickles that nobody allowed; names the setting `field`.
    """
    try:
        safe = _files(folder, _named_by_config(folder) or _SAFE)
        if safe:
            return _shapes(safe)
        pickled = _files(folder, _PICKLED)
    except ValueError as error:
        raise BadInput(Problem(field, settings.path, str(error), "fetch or write it again, whole")) from None
    if not pickled:
        mend = "give a folder that save_pretrained or the hub has filled"
        raise BadInput(Problem(field, settings.path, f"holds no weights ({_SAFE})", mend))
    if not settings.allow_pickle:
        wrong = f"its weights are pickles only ({_PICKLED}), files that may run code when they are read"
        raise BadInput(Problem(field, settings.path, wrong, f"make safetensors of them, or {permission(field)}"))
    return {}


def permission(field: str) -> str:
    """What to do to have pickles read, said of the setting or argument `field` that names the model."""
    section, _, key = field.rpartition(".")
    flag = f"{section}.allow_pickle=true" if section and key == "path" else "--allow-pickle"
    return f"give {flag} if you trust them"


def _named_by_config(folder: Path) -> str | None:
    try:
        named = json.loads((folder / "config.json").read_bytes()).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # not what is looked at here
    if named is not None and (not isinstance(named, str) or Path(named).name != named):
        raise ValueError(f"its config.json leads out of the folder, to {str(named)[:200]!r}")
    return named


def _files(folder: Path, name: str) -> dict[Path, set[str]]:
    """The files that `name` or its index stands for, each with the weights that the index promises of it.

    Raises:
        ValueError: an index that cannot be followed.
    """
    index = folder / (name if name.endswith(_INDEX) else name + _INDEX)
    if index.name != name and (folder / name).is_file():
        return {folder / name: set()}
    if not index.is_file():
        return {}
    try:
        weights = json.loads(index.read_bytes())["weight_map"]
        named = [(str(weight), Path(folder, file).name == file, folder / file) for weight, file in weights.items()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index.name} is no index of weights") from None
    found: dict[Path, set[str]] = {}
    for weight, inside, file in named:
        if not inside:
            raise ValueError(f"{index.name} leads out of the folder, to {str(file)[:200]!r}")
        if not file.is_file():
            raise ValueError(f"{file.name}, which {index.name} names, is not there")
        found.setdefault(file, set()).add(weight)
    if not found:
        raise ValueError(f"{index.name} names no weights")
    return found


def _shapes(files: dict[Path, set[str]]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path, promised in files.items():
        try:
            with safe_open(path, framework="np") as opened:
                opened_file: Any = opened
                shapes |= {name: opened_file.get_slice(name).get_shape() for name in opened_file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            with path.open("rb") as file:
                pointer = file.read(len(_POINTER)) == _POINTER
            said = "a pointer of git-lfs: `git lfs pull` fetches it" if pointer else str(error)
            raise ValueError(f"{path.name} is no whole safetensors file ({said})") from None
        if missing := promised - shapes.keys():
            raise ValueError(f"{path.name} lacks {min(missing)!r}, which the index promises")
    return shapes
