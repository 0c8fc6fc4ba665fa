"""What every section of a config has in common."""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

# What a float holds exactly; no setting is larger.
_LARGEST = 2**53
# Of Linux, in bytes: of a file's name, and of a path.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095

_HALF_A_PAIR = re.compile("[\ud800-\udfff]")

P = TypeVar("P", str, Path)


class Settings(BaseModel):
    """Base of every section: immutable, closed to unknown keys, and strict where YAML and Python are not."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_no_stray_switch(cls, given: Any) -> Any:
        # Python takes True for 1. A validator of the fields would not do: pydantic wants none on `objective.name`.
        wrong = PydanticCustomError("stray_switch", "is no switch; YAML reads yes, no, on and off as true and false")
        found = [
            InitErrorDetails(type=wrong, loc=(name,), input=value)
            for name, value in (given.items() if isinstance(given, dict) else ())
            if name in cls.model_fields and cls.model_fields[name].annotation is not bool and _holds_switch(value)
        ]
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found)
        return given

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_kept(cls, value: Any) -> Any:
        items = value if isinstance(value, tuple) else [value]
        if any(isinstance(item, (int, float)) and abs(item) > _LARGEST for item in items):
            raise ValueError("is too large a number")
        if any(isinstance(item, str) and _HALF_A_PAIR.search(item) for item in items):
            raise ValueError("holds half a surrogate pair, which is no text")
        return value


def _holds_switch(value: Any) -> bool:
    return any(isinstance(item, bool) for item in (value if isinstance(value, (list, tuple)) else [value]))


def _usable(path: P) -> P:
    """A path that the file system can be asked about.

    Raises:
        ValueError: it cannot.
    """
    text = str(path)
    parts = text.split("/")
    if not text.strip() or (isinstance(path, Path) and text == "."):
        raise ValueError("names nothing")
    if "://" in text or (isinstance(path, Path) and parts[0].endswith(":")):
        raise ValueError("is an address; a path or a hub id is needed")
    if parts[0].startswith("~"):
        raise ValueError("~ is the shell's; write the path out")
    if not text.isprintable():
        raise ValueError("holds a character that no path should")
    if len(text.encode()) > _LONGEST_PATH or max(len(part.encode()) for part in parts) > _LONGEST_NAME:
        raise ValueError("is longer than a path can be")
    return path


FilePath = Annotated[Path, AfterValidator(_usable)]
"""A file or folder, which need not be there yet."""
ModelPath = Annotated[str, AfterValidator(_usable)]
"""A folder or hub id."""
