"""A YAML file plus `section.key=value` overrides → checked settings, or one line for each mistake."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from distill.errors import BadInput, Problem
from distill.objective_settings import OBJECTIVES
from distill.settings import Settings
from distill.yaml_file import Unreadable, parse_yaml, read_yaml

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Kind(Generic[S]):
    """A kind of file, and what errors say of it."""

    model: type[S]
    sections: Mapping[str, type[Settings]]
    """By the key that holds one."""
    field: str
    """The argument that names it."""
    what: str
    """What it is, and where to see one."""
    holds: str
    """What stands in it."""
    reference: str
    """Where its settings are described, in README.md."""


def read_settings(kind: Kind[S], path: Path, overrides: Sequence[str]) -> S:
    """The file's settings; an override wins over the file.

    Raises:
        BadInput: an unreadable file, an override that is not `key=value`, or settings that do not fit; all at once.
    """
    raw = _read(path, kind)
    for override in overrides:
        _apply_override(raw, override, kind)
    try:
        return kind.model.model_validate(raw)
    except ValidationError as error:
        raise BadInput([describe(item, kind) for item in error.errors()]) from None


def _read(path: Path, kind: Kind[S]) -> dict[str, Any]:
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "no such file"
        raise BadInput(Problem(kind.field, str(path), wrong, f"give the path of {kind.what}"))
    try:
        raw = read_yaml(path)
    except Unreadable as error:
        where = f"{path}:{error.line}" if error.line else str(path)
        raise BadInput(Problem(kind.field, where, str(error), "correct the file")) from None
    if not isinstance(raw, dict):
        raise BadInput(Problem(kind.field, str(path), "holds no settings", f"give it {kind.holds}"))
    return raw


def _apply_override(raw: dict[str, Any], override: str, kind: Kind[S]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise BadInput(Problem("override", override, "not of the form section.key=value", "e.g. optim.lr=1e-5"))
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise BadInput(Problem(key, text, f"{parent!r} is a value, not a section", f"see {kind.reference}"))
    try:
        node[leaf] = parse_yaml(text)
    except Unreadable as error:
        raise BadInput(Problem(key, text, str(error), "quote it")) from None


def describe(error: Any, kind: Kind[S]) -> Problem:
    """One of pydantic's errors, as the user knows his settings."""
    location = [str(part) for part in error["loc"]]
    # pydantic puts a union's tag into the path (objective.minillm.gamma); users write objective.gamma.
    if len(location) > 1 and location[0] == "objective":
        location = [location[0], *location[2:]]
    field, value = ".".join(location), error.get("input")
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"], kind)
        near = difflib.get_close_matches(location[-1], known, n=1)
        return Problem(
            field, value, "unknown key", f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        )
    if error["type"] == "missing":
        return Problem(field, None, "missing", "add it")
    if error["type"] in ("model_type", "model_attributes_type"):
        return Problem(field, value, "is no section of settings", f"give it keys, as in {kind.reference}")
    if error["type"] == "path_type":
        return Problem(field, value, "is no path", "give a text")
    if error["type"] == "union_tag_invalid":
        tag = value.get("name") if isinstance(value, dict) else value
        return Problem("objective.name", tag, "unknown objective", f"one of {error['ctx']['expected_tags']}")
    if error["type"] == "union_tag_not_found":
        return Problem("objective.name", None, "missing", f"name one of {', '.join(OBJECTIVES)}")
    wrong = error["msg"].removeprefix("Value error, ")
    return Problem(field, value, wrong[:1].lower() + wrong[1:], f"see {kind.reference} in README.md")


def _known_keys(location: Sequence[Any], kind: Kind[S]) -> list[str]:
    model = kind.model if len(location) == 1 else kind.sections[str(location[-2])]
    return list(model.model_fields)
