"""What was broken and what came of it: the table that the fault tests print, and runs/faults.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path

_COLUMNS = ("fault", "injected", "steps lost", "seconds to end", "bit-exact", "survived")


@dataclass
class Fault:
    """One kind of fault."""

    injected: int = 0
    steps_lost: list[int] = field(default_factory=list)
    """Since the last checkpoint that was complete when the fault struck, done again after it."""
    seconds: list[float] = field(default_factory=list)
    """From the fault until every rank had ended."""
    corrupted: int = 0
    """Runs that could not go on."""
    lost: int = 0
    """Runs that lost a complete checkpoint."""
    orphans: int = 0
    not_bit_exact: int = 0
    compared: bool = True
    """Whether the run went on to its end and was compared."""


class Ledger:
    """Faults by name."""

    def __init__(self) -> None:
        self.faults: dict[str, Fault] = {}

    def __getitem__(self, name: str) -> Fault:
        return self.faults.setdefault(name, Fault())

    def figures(self) -> dict[str, float]:
        """The sums that runs/faults.json holds."""
        faults = self.faults.values()
        figures: dict[str, float] = {
            name: sum(getattr(fault, name) for fault in faults)
            for name in ("injected", "corrupted", "lost", "orphans", "not_bit_exact")
        }
        return figures | {"max_seconds_to_end": max((s for fault in faults for s in fault.seconds), default=0.0)}

    def write(self, path: Path) -> None:
        """Write the figures."""
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(self.figures(), indent=1) + "\n")

    def table(self) -> str:
        """For the terminal."""
        rows = [_COLUMNS, *(_row(name, fault) for name, fault in self.faults.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(name: str, fault: Fault) -> tuple[str, ...]:
    steps, seconds = fault.steps_lost, fault.seconds
    whole = fault.corrupted == fault.lost == fault.orphans == 0
    return (
        name,
        str(fault.injected),
        f"{min(steps)} to {max(steps)}" if steps else "-",
        f"{max(seconds):.1f}" if seconds else "-",
        "-" if not fault.compared else "yes" if not fault.not_bit_exact else f"{fault.not_bit_exact} not",
        "yes" if whole else f"corrupted {fault.corrupted}, lost {fault.lost}, orphans {fault.orphans}",
    )
