"""A run's student as a folder that any transformers user can load."""

import shutil
from pathlib import Path

from distill.checkpoint.students import STUDENT
from distill.config import model_at
from distill.errors import BadInput, Problem
from distill.models.loading import load_config, load_tokenizer
from distill.models.weights import check_weights

_RESULTS_HEADING = "## Results"


def export(run: Path, out: Path, results: str) -> None:
    """Copy `run/student` to `out`, with `results` added to its model card.

    Raises:
        BadInput: the run has no student yet, or not a whole one, or `out` exists or cannot be written.
    """
    source = run / STUDENT
    if not (source / "config.json").is_file():
        raise BadInput(
            Problem("--run", str(run), "has no finished student", "train it to its first validation or its end")
        )
    if out.exists() or not out.name:
        raise BadInput(Problem("--out", str(out), "exists already", "remove it or name another folder"))
    if link := next((path for path in source.rglob("*") if path.is_symlink()), None):
        wrong = f"{link} is a link; a student holds files only"
        raise BadInput(Problem("--run", str(run), wrong, "put the file in its place"))
    # Opening it here finds a damaged folder before anyone relies on it.
    model = model_at(str(source), "--run")
    load_config(model, "--run")
    load_tokenizer(str(source), "--run")
    check_weights(source, model, "--run")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial)
    except OSError as error:
        raise BadInput(Problem("--out", str(out), f"cannot be written ({error})", "name another folder")) from None
    if results:
        card = partial / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        card.write_text(f"{text}\n{_RESULTS_HEADING}\n\n{results}\n", encoding="utf-8")
    partial.rename(out)
