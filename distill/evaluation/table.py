"""Evaluation figures as a table for people."""

from collections.abc import Mapping

COLUMNS = {
    "rouge_l": "Rouge-L ↑",
    "reverse_kl": "KL(q‖p) ↓",
    "forward_kl": "KL(p‖q) ↓",
    "mean_length": "length",
    "repetition": "repetition",
    "top1_agreement": "top-1 ↑",
}


def rows(report: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Header and one row a model, as text."""
    body = [[name, *(f"{figures[key]:.3f}" for key in COLUMNS)] for name, figures in report.items()]
    return [["model", *COLUMNS.values()], *body]


def terminal_table(report: Mapping[str, Mapping[str, float]]) -> str:
    """Aligned columns."""
    table = rows(report)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(report: Mapping[str, Mapping[str, float]]) -> str:
    """The same for a README."""
    header, *body = rows(report)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body])
