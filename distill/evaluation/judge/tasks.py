"""Responses → questions to the judge, each with the hash of its request, by which its verdict is found again."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.errors import BadInput, Problem
from distill.evaluation.judge.material import Material
from distill.evaluation.judge.prompts import Mode, asked_again, prompt
from distill.evaluation.judge.settings import Judge

REFERENCE = "the reference"
"""No model is called so: their names hold no space."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class Place:
    """What a verdict is about."""

    mode: Mode
    set: str
    seed: int
    row: int
    """From 0, as in the files of responses."""
    first: str
    """Whose response stands first: a model's name, or `REFERENCE`."""
    second: str

    def __str__(self) -> str:
        return f"{self.set} row {self.row}, seed {self.seed}, {self.first} before {self.second}"


@dataclass(frozen=True)
class Task:
    """One question to a judge."""

    place: Place
    text: str
    key: str

    @classmethod
    def of(cls, place: Place, text: str, judge: Judge) -> "Task":
        """With the hash of its request."""
        content = json.dumps(request(judge, text), sort_keys=True).encode()
        return cls(place, text, hashlib.sha256(content).hexdigest()[:32])


def request(judge: Judge, text: str, ask: int = 0) -> dict[str, Any]:
    """All fields of one; asked for another time it has other words and the next seed."""
    options = dict(judge.options)
    if ask and isinstance(options.get("seed"), int):
        options["seed"] += ask
    return options | {"model": judge.model, "messages": [{"role": "user", "content": asked_again(text, ask)}]}


def longest_prompt(body: Mapping[str, Any]) -> int:
    """Tokens that a request's prompt has at most: no tokenizer makes more of them than there are bytes."""
    return sum(len(turn["content"].encode()) for turn in body["messages"]) + _OF_A_TEMPLATE


# Turns' marks, and what some templates say of themselves.
_OF_A_TEMPLATE = 100


def score_tasks(material: Material, judge: Judge) -> list[Task]:
    """Each response beside its reference, which stands first in every other row.

    Raises:
        BadInput: a set without references.
    """
    for name, questions in material.sets.items():
        if not questions[0].references:
            mend = "choose others with --set, or compare two models with --pair"
            raise BadInput(Problem("--set", name, "has no references to score beside the responses", mend))
    found = []
    for (model, name, seed), texts in material.responses.items():
        for row, text in enumerate(texts):
            question = material.sets[name][row]
            both = [(model, text), (REFERENCE, question.references[0])]
            found.append(_task("score", name, seed, row, question.prompt, both[:: -1 if row % 2 else 1], judge))
    return found


def pair_tasks(material: Material, pairs: Sequence[Pair], judge: Judge) -> list[Task]:
    """Each two responses to one prompt with one seed, in both orders."""
    return [task for pair in pairs for task in _of_pair(material, pair, judge)]


def _of_pair(material: Material, pair: Pair, judge: Judge) -> Iterator[Task]:
    for name, questions in material.sets.items():
        for seed in material.seeds:
            for row, question in enumerate(questions):
                both = [(model, material.responses[model, name, seed][row]) for model in pair]
                for ordered in (both, both[::-1]):
                    yield _task("pairs", name, seed, row, question.prompt, ordered, judge)


def _task(
    mode: Mode, name: str, seed: int, row: int, asked: str, responses: Sequence[tuple[str, str]], judge: Judge
) -> Task:
    (first, one), (second, other) = responses
    return Task.of(Place(mode, name, seed, row, first, second), prompt(mode, asked, one, other), judge)
