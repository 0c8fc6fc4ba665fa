"""One bad input, and the place in which it is made."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Place:
    """Inputs are made in `given`; the command runs in `work`, which stays empty."""

    given: Path
    work: Path
    good: dict[str, dict[str, Any]]
    """A run of which the doctor has nothing to say."""
    models: Path
    records: Path

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.given / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def recipe(self, content: str | bytes) -> list[str]:
        """The doctor, asked about a recipe of that content."""
        return ["distill", "doctor", "--config", str(self.file("run.yaml", content))]

    def doctor(self, *overrides: str, **changes: Any) -> list[str]:
        """The doctor, asked about the good run with changes: `section__key=value`, or whole sections."""
        config = json.loads(json.dumps(self.good))
        for name, value in changes.items():
            section, _, key = name.partition("__")
            if key:
                config.setdefault(section, {})[key] = value
            else:
                config[section] = value
        return [*self.recipe(yaml.safe_dump(config)), "--ranks", "2", *overrides]

    def deepspeed(self, content: str | bytes) -> list[str]:
        return self.doctor(parallel__deepspeed=str(self.file("ds.json", content)))

    def model(self, name: str = "student") -> Path:
        """A copy of a good model's folder."""
        return Path(shutil.copytree(self.models / name, self.given / name))

    def student(self, folder: Path) -> list[str]:
        return self.doctor(student__path=str(folder))

    def copied(self, name: str = "train") -> Path:
        """A copy of a good folder of records."""
        return Path(shutil.copytree(self.records / name, self.given / name))

    def train(self, folder: Path) -> list[str]:
        return self.doctor(data__train=str(folder))

    def preprocess(self, data: str | Path, *flags: str, **changes: str) -> list[str]:
        given = {
            "out": str(self.work / "made/for/it"),
            "tokenizer": str(self.models / "student"),
            "template": "chat",
        } | changes
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        return ["preprocess", "--data", str(data), *words, "--workers", "1", *flags]


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content.pop(name, None)
        if value is not None:
            content[name] = value
    path.write_text(json.dumps(content))


def cut(path: Path, share: float) -> None:
    """Keep the first share of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@dataclass(frozen=True)
class Case:
    """`command` makes the input and says what to run; the message must hold `expected`, GIVEN and WORK filled in."""

    name: str
    expected: str
    command: Callable[[Place], list[str]]
