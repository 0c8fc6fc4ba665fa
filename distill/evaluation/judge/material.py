"""What is judged: the responses that lie in the folder of an evaluation, with their questions."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import BadInput, Problem
from distill.evaluation.questions import Question, questions_file, read_questions
from distill.evaluation.table import EVALUATION

_AGAIN = "run the same `distill evaluate` again"


@dataclass(frozen=True)
class Material:
    """Responses of some models to some sets, with some seeds."""

    folder: Path
    evaluation: dict[str, Any]
    sets: dict[str, list[Question]]
    seeds: list[int]
    responses: dict[tuple[str, str, int], list[str]]
    """By model, set and seed, in the set's order."""

    @property
    def resamples(self) -> int:
        """Behind each interval."""
        return int(self.evaluation["suite"]["resamples"])

    def weights(self, model: str) -> str:
        """A hash of what wrote a model's responses."""
        return str(self.evaluation["models"][model]["weights"])


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What `distill evaluate` wrote there.

    Raises:
        BadInput: it wrote nothing there, or something else did.
    """
    path = folder / EVALUATION
    if not path.is_file():
        wrong = f"no {EVALUATION} in it" if folder.is_dir() else "no such folder"
        raise BadInput(Problem("DIR", str(folder), wrong, "give the folder --out of `distill evaluate`"))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        suite = content["suite"]
        fits = isinstance(suite["sets"], dict) and isinstance(suite["seeds"], list) and suite["resamples"] > 0
        fits = fits and all(isinstance(about["weights"], str) for about in content["models"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise BadInput(Problem("DIR", str(path), "is no evaluation by a suite", _AGAIN))
    return dict(content)


def read_material(
    folder: Path, models: Sequence[str], sets: Sequence[str], seeds: Sequence[int], named_by: str = "--model"
) -> Material:
    """Responses of `models`, which the flag `named_by` names, to `sets` with `seeds`; of an empty list, of all.

    Raises:
        BadInput: a name that the evaluation does not know, or responses that are not there.
    """
    evaluation = read_evaluation(folder)
    suite = evaluation["suite"]
    if not suite["sets"]:
        wrong = "its suite has no `sets`, so nobody responded"
        raise BadInput(Problem("DIR", str(folder), wrong, "evaluate a suite of prompts"))
    chosen = _chosen(named_by, models, list(evaluation["models"]))
    questions = {name: _questions(folder, name) for name in _chosen("--set", sets, list(suite["sets"]))}
    drawn = _chosen("--seed", seeds, suite["seeds"])
    responses = {
        (model, name, seed): _responses(folder, evaluation, model, name, seed, len(rows))
        for model in chosen
        for name, rows in questions.items()
        for seed in drawn
    }
    return Material(folder, evaluation, questions, drawn, responses)


def _chosen(field: str, wanted: Sequence[Any], known: list[Any]) -> list[Any]:
    for one in wanted:
        if one not in known:
            names = ", ".join(map(str, known))
            raise BadInput(Problem(field, one, "is not in this evaluation", f"it has {names}"))
    return list(dict.fromkeys(wanted)) or known


def _questions(folder: Path, name: str) -> list[Question]:
    path = questions_file(folder, name)
    try:
        return read_questions(path)
    except FileNotFoundError:
        raise BadInput(Problem("DIR", str(path), "is missing", _AGAIN)) from None
    except (OSError, ValueError) as error:
        raise BadInput(Problem("DIR", str(path), f"cannot be read ({error})", _AGAIN)) from None


def _responses(folder: Path, evaluation: dict[str, Any], model: str, name: str, seed: int, rows: int) -> list[str]:
    path = folder / model / f"{name}.seed-{seed}.jsonl"
    try:
        origin, *records = _lines(path)
        if origin["model"] != evaluation["models"][model]["weights"]:
            raise BadInput(Problem("DIR", str(path), f"is newer than {EVALUATION}, or older", _AGAIN))
        found = {record["row"]: record["text"] for record in records}
        if not all(isinstance(text, str) for text in found.values()):
            raise ValueError("a response is no text")
    except FileNotFoundError:
        raise BadInput(Problem("DIR", str(path), "is missing", _AGAIN)) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInput(Problem("DIR", str(path), f"holds no responses ({error})", f"remove it, and {_AGAIN}")) from None
    if sorted(found) != list(range(rows)):
        wrong = f"holds {len(found)} responses, its set has {rows} rows"
        raise BadInput(Problem("DIR", str(path), wrong, _AGAIN))
    return [found[row] for row in range(rows)]


def _lines(path: Path) -> Iterator[Any]:
    return map(json.loads, path.read_bytes().split(b"\n")[:-1])
