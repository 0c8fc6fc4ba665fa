"""What the checks have found."""

from dataclasses import dataclass, field

from distill.errors import Problem


@dataclass
class Report:
    """What was found: mistakes that stop the run, and notices that only inform."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def check(self, holds: bool, field_name: str, value: object, wrong: str, mend: str) -> None:
        """Record a problem unless `holds`."""
        if not holds:
            self.problems.append(Problem(field_name, value, wrong, mend))
