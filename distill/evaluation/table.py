"""Evaluation figures as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

EVALUATION = "evaluation.json"
"""In the folder --out of an evaluation."""

COLUMNS = {
    "rouge_l": ("Rouge-L ↑", 1),
    "exact_match": ("exact ↑", 1),
    "reverse_kl": ("KL(q‖p) ↓", 3),
    "forward_kl": ("KL(p‖q) ↓", 3),
    "top1_agreement": ("top-1 ↑", 3),
    "length": ("length", 1),
    "repetition": ("repetition", 3),
    "dist_4": ("Dist-4", 3),
    "accuracy": ("accuracy ↑", 3),
    "ece": ("ECE ↓", 3),
    "perplexity": ("perplexity ↓", 2),
}
"""What is shown of each set, where it was measured: heading and decimals. `evaluation.json` has all."""

Evaluation = Mapping[str, Any]
"""What `distill evaluate` writes."""


def sets_of(evaluation: Evaluation) -> list[str]:
    """Sets, choices and texts, in the suite's order."""
    return [name for kind in ("sets", "choices", "texts") for name in evaluation["suite"][kind]]


def rows(evaluation: Evaluation, name: str) -> list[list[str]]:
    """Of one set: header, and one row a model; intervals in brackets."""
    figures = {model: of[name] for model, of in evaluation["figures"].items()}
    shown = [key for key in COLUMNS if any(key in of for of in figures.values())]
    body = [[model, *(_cell(of.get(key), COLUMNS[key][1]) for key in shown)] for model, of in figures.items()]
    return [["model", *(COLUMNS[key][0] for key in shown)], *body]


def _cell(estimate: Mapping[str, float] | None, decimals: int) -> str:
    if estimate is None:
        return "–"
    value, low, high = (f"{estimate[key]:.{decimals}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def terminal_tables(evaluation: Evaluation) -> str:
    """Aligned columns, a table a set."""
    return "\n\n".join(f"{name}\n{aligned(rows(evaluation, name))}" for name in sets_of(evaluation))


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Header, rule and rows, each column as wide as it must be."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(evaluation: Evaluation, name: str) -> str:
    """One set's for a README."""
    return markdown(rows(evaluation, name))


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Header and rows, with the rule that Markdown wants."""
    header, *body = table
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body])
