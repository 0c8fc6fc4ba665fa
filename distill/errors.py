"""What a user did wrong, said once and clearly; anything else is a bug and keeps its traceback."""

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_BAD_INPUT = 2
EXIT_DOES_NOT_FIT = 3


@dataclass(frozen=True)
class Problem:
    """One mistake in the input: where it stands, what stands there, why it cannot work, how to mend it."""

    field: str
    value: object
    wrong: str
    mend: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.wrong}; {self.mend}"


class BadInput(Exception):
    """Raised for input that only the user can mend. The command line prints it without a traceback and exits with 2."""

    def __init__(self, problems: Problem | Sequence[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        self.told = False
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type["BadInput"], tuple[list[Problem]]]:
        """Worker processes send it back whole."""
        return BadInput, (self.problems,)
