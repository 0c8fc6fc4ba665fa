"""What a judge said, as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.table import aligned

_COLUMNS: Mapping[str, Mapping[str, tuple[str, float, int]]] = {
    "score": {
        "score": ("points ↑", 1, 2),
        "reference": ("reference's", 1, 2),
        "ratio": ("ratio, % ↑", 100, 1),
    },
    "pairs": {
        "win_rate": ("win rate, % ↑", 100, 1),
        "wins": ("wins, %", 100, 1),
        "ties": ("ties, %", 100, 1),
        "losses": ("losses, %", 100, 1),
        "disagreement": ("orders disagree, %", 100, 1),
    },
}
"""By mode: heading, factor and decimals of each figure."""


def terminal_tables(entries: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns, a table a set; intervals in brackets."""
    found = []
    for name in dict.fromkeys(entry["set"] for entry in entries):
        of_set = [entry for entry in entries if entry["set"] == name]
        found.append(f"{name}, judged by {of_set[0]['judge']}\n{aligned(_rows(of_set))}")
    return "\n\n".join(found)


def _rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = _COLUMNS[entries[0]["mode"]]
    header = ["model", *(heading for heading, _, _ in columns.values()), "verdicts", "unparsable replies"]
    return [header, *(_row(entry, columns) for entry in entries)]


def _row(entry: Mapping[str, Any], columns: Mapping[str, tuple[str, float, int]]) -> list[str]:
    cells = [_cell(entry["figures"].get(key), factor, decimals) for key, (_, factor, decimals) in columns.items()]
    judged = f"{entry['verdicts']} of {entry['questions']}"
    return [" against ".join(entry["models"]), *cells, judged, str(entry["unparsable_replies"])]


def _cell(estimate: Mapping[str, float] | None, factor: float, decimals: int) -> str:
    if estimate is None:
        return "–"
    value, low, high = (f"{factor * estimate[key]:.{decimals}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
