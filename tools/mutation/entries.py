"""Reads tests/mutants.yaml: one-line mistakes, each with the tests that may see it."""

import ast
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.errors import BadInput, Problem
from distill.yaml_file import Unreadable, read_yaml

ENTRIES = Path("tests/mutants.yaml")


class Mutant(BaseModel):
    """One mistake: `find`, which stands in `file` once, becomes `replace`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    room: str = Field(min_length=1)
    file: str = Field(min_length=1)
    find: str = Field(min_length=1)
    replace: str
    why: str = Field(min_length=1)
    """What goes wrong, in a sentence."""
    tests: tuple[str, ...] = ()
    """Arguments of pytest, the cheapest first: the mutant is killed by the first that fails."""
    equivalent: str | None = None
    """Why no test can see it. Such a mutant is counted apart and never run."""
    survives: str | None = None
    """Why no test sees it though one could."""
    origin: str | None = Field(None, alias="from")
    """Its number in an earlier list."""
    survived_before: bool = False
    """Whether the tests did not notice it when it was tried first."""

    def line_in(self, text: str) -> int:
        """Return the line at which the mistake begins, from 1."""
        return text[: text.index(self.find)].count("\n") + 1


class Entries(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preload: tuple[str, ...] = ()
    """Modules that take long to import and are not part of the project: imported once, for all mutants."""
    mutants: tuple[Mutant, ...]


def read_entries(path: Path) -> Entries:
    """Read the file; nothing is compared with the code yet.

    Raises:
        BadInput: a line for each entry that cannot be read or whose id is taken.
    """
    try:
        raw = read_yaml(path)
    except Unreadable as error:
        where = f"{path}:{error.line}" if error.line else str(path)
        raise BadInput(Problem("mutants", where, str(error), "correct the file")) from None
    try:
        entries = Entries.model_validate(raw)
    except ValidationError as error:
        raise BadInput([_problem(raw, item["loc"], item["msg"], item["input"]) for item in error.errors()]) from None
    problems = []
    for name, count in Counter(mutant.id for mutant in entries.mutants).items():
        if count > 1:
            problems.append(Problem(name, count, "entries have this id", "give each its own"))
    for mutant in entries.mutants:
        if not mutant.tests and mutant.equivalent is None:
            problems.append(Problem(f"{mutant.id}.tests", [], "no test is to see it", "name one, or say `equivalent:`"))
        problems += [problem for target in mutant.tests if (problem := _target_problem(mutant.id, target))]
    if problems:
        raise BadInput(problems)
    return entries


def _problem(raw: object, location: tuple[int | str, ...], wrong: str, value: object) -> Problem:
    """Name the entry that an error of pydantic is about."""
    names = [str(part) for part in location]
    if location[:1] == ("mutants",) and len(location) > 1 and isinstance(raw, dict):
        entry = raw["mutants"][location[1]]
        names = [str(entry.get("id", f"entry {location[1]}")) if isinstance(entry, dict) else names[1], *names[2:]]
    return Problem(".".join(names) or str(ENTRIES), value, wrong, "correct the entry")


def _target_problem(name: str, target: str) -> Problem | None:
    try:
        words = shlex.split(target)
    except ValueError as error:
        return Problem(f"{name}.tests", target, str(error), "quote it as in a shell")
    if not words or words[0].startswith("-"):
        return Problem(f"{name}.tests", target, "does not begin with a file", "begin with the file of the tests")
    return None


def file_of(target: str) -> str:
    """Return the file of tests that a target begins with."""
    return shlex.split(target)[0].partition("::")[0]


def check(mutants: Sequence[Mutant], project: Path) -> None:
    """See that each mistake can be made, in one place only.

    Raises:
        BadInput: a line for each entry whose text is not there, there twice, or no code after the change.
    """
    texts: dict[str, str | None] = {}
    problems = []
    for mutant in mutants:
        if mutant.file not in texts:
            path = project / mutant.file
            texts[mutant.file] = path.read_text(encoding="utf-8") if path.is_file() else None
        if problem := _misfit(mutant, texts[mutant.file]):
            problems.append(problem)
    if problems:
        raise BadInput(problems)


def _misfit(mutant: Mutant, text: str | None) -> Problem | None:
    if text is None:
        return Problem(f"{mutant.id}.file", mutant.file, "no such file", "name the file where the code is now")
    count = text.count(mutant.find)
    if count != 1:
        wrong = f"is not in {mutant.file}" if count == 0 else f"stands {count} times in {mutant.file}"
        return Problem(f"{mutant.id}.find", mutant.find, wrong, "quote the code as it is, as much as makes it unique")
    if mutant.replace == mutant.find:
        return Problem(f"{mutant.id}.replace", mutant.replace, "changes nothing", "write the mistake")
    if mutant.file.endswith(".py"):
        try:
            ast.parse(text.replace(mutant.find, mutant.replace))
        except SyntaxError as error:
            wrong = f"makes no Python of {mutant.file} ({error.msg})"
            return Problem(f"{mutant.id}.replace", mutant.replace, wrong, "write a mistake that runs")
    return None
