"""A run's student as a folder that any transformers user can load."""

import shutil
from pathlib import Path

from distill.checkpoint.students import STUDENT
from distill.config import ModelSettings
from distill.errors import BadInput, Problem
from distill.models.loading import load_config, load_tokenizer

_RESULTS_HEADING = "## Results"


def export(run: Path, out: Path, results: str) -> None:
    """Copy `run/student` to `out`, with `results` added to its model card.

    Raises:
        BadInput: the run has no student yet, or `out` exists.
    """
    source = run / STUDENT
    if not (source / "config.json").is_file():
        raise BadInput(
            Problem("--run", str(run), "has no finished student", "train it to its first validation or its end")
        )
    if out.exists():
        raise BadInput(Problem("--out", str(out), "exists already", "remove it or name another folder"))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    if results:
        card = partial / "README.md"
        card.write_text(f"{card.read_text(encoding='utf-8')}\n{_RESULTS_HEADING}\n\n{results}\n", encoding="utf-8")
    # Opening it here finds a damaged folder before anyone relies on it.
    load_config(ModelSettings(path=str(partial)), "--run")
    load_tokenizer(str(partial), "--run")
    partial.rename(out)
