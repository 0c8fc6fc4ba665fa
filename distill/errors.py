"""What a user did wrong, said once and clearly; anything else is a bug and keeps its traceback."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

EXIT_FAILED = 1
"""A crash: starting again may help."""
EXIT_BAD_INPUT = 2
EXIT_DOES_NOT_FIT = 3
EXIT_BAD_NUMBERS = 4
"""Too many steps in a row were not finite: starting again would end there again."""
EXIT_PREEMPTED = 75
"""Told to stop, saved, stopped: the same command goes on (sysexits' EX_TEMPFAIL)."""


_LONGEST_VALUE = 300
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SECRETS = {"key", "apikey", "token", "secret", "password", "passwd", "credentials"}


@dataclass(frozen=True)
class Problem:
    """One mistake in the input: where it stands, what stands there, why it cannot work, how to mend it."""

    field: str
    value: object
    wrong: str
    mend: str

    def __str__(self) -> str:
        """One line that no input can break, make endless, or use to put a password on the console."""
        secret = not _SECRETS.isdisjoint(re.split(r"[._-]", self.field.lower()))
        value = "'***'" if secret and self.value is not None else repr(self.value)
        if len(value) > _LONGEST_VALUE:
            value = f"{value[:_LONGEST_VALUE]}…"
        return _USER_OF_URL.sub("***", _one_line(f"{self.field} = {value}: {self.wrong}; {self.mend}"))


def _one_line(text: str) -> str:
    """What a terminal would act on is written as Python writes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Absence(Problem):
    """Of a host that does not answer: it may yet come."""


class BadInput(Exception):
    """Raised for input that only the user can mend. The command line prints it without a traceback; exit `code`."""

    code = EXIT_BAD_INPUT

    def __init__(self, problems: Problem | Sequence[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        self.told = False
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type["BadInput"], tuple[list[Problem]]]:
        """Worker processes send it back whole."""
        return type(self), (self.problems,)


class Unreachable(BadInput):
    """Raised where hosts do not answer, which may mend itself: told in the same way, but starting again may help."""

    code = EXIT_FAILED


def refusal(problems: Sequence[Problem]) -> BadInput:
    """The error of all `problems`: that of hosts which may yet come if there is no other."""
    absent = bool(problems) and all(isinstance(problem, Absence) for problem in problems)
    return Unreachable(problems) if absent else BadInput(problems)


class Ended(Exception):
    """Raised on every rank alike to end a run in an orderly way: no traceback, exit with `code`."""

    def __init__(self, code: int, text: str):
        self.code = code
        super().__init__(text)
