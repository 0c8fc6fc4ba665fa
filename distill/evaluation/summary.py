"""All that was measured → one dictionary of figures with intervals: `evaluation.json`."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from itertools import combinations
from typing import Any

from distill.evaluation.figures import curves, diversity, of_answers, of_choices, of_text
from distill.evaluation.measurement import Measurement
from distill.evaluation.statistics import Bootstrap, Figure
from distill.evaluation.suite import Suite

_SAMPLES = 12
_WHATEVER_THE_TOKENS = {"rouge_l", "exact_match", "accuracy", "ece"}
"""Figures that models with different tokenizers can be compared by; all others count tokens."""


@cache
def _bootstrap(rows: int, resamples: int) -> Bootstrap:
    return Bootstrap(rows, resamples)


def sum_up(suite: Suite, measured: Sequence[Measurement]) -> dict[str, Any]:
    """Figures by model and set, curves by position, differences of each two students, and some responses."""
    figures = {one.subject.name: _figures(one) for one in measured}
    return {
        "suite": suite.model_dump(mode="json"),
        "models": {
            one.subject.name: {"path": one.subject.settings.path, "weights": one.subject.origin["model"]}
            for one in measured
        },
        "figures": {one.subject.name: _estimates(suite, one, figures[one.subject.name]) for one in measured},
        "curves": {one.subject.name: {name: curves(one.scores(name)) for name in suite.sets} for one in measured},
        "differences": _differences(suite, measured, figures),
        "samples": {name: _samples(suite, measured, name) for name in suite.sets},
    }


def _figures(one: Measurement) -> dict[str, dict[str, Figure]]:
    """By set."""
    sets = one.subject.sets
    found = {name: of_answers(one.scores(name)) for name in sets.prompts}
    for name, questions in sets.choices.items():
        found[name] = of_choices(one.scores(name).given, questions)
    return found | {name: of_text(one.scores(name).given) for name in sets.texts}


def _estimates(suite: Suite, one: Measurement, figures: dict[str, dict[str, Figure]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, of_set in figures.items():
        bootstrap = _bootstrap(one.subject.sets.rows(name), suite.resamples)
        intervals = {key: bootstrap.of_biased if key == "ece" else bootstrap.of for key in of_set}
        found[name] = {key: asdict(intervals[key](figure)) for key, figure in of_set.items()}
    for name in one.subject.sets.prompts:
        ids = [[answer.ids for answer in one.answers(name, seed)] for seed in suite.seeds]
        found[name] |= {key: asdict(estimate) for key, estimate in diversity(ids).items()}
    return found


def _differences(
    suite: Suite, measured: Sequence[Measurement], figures: dict[str, dict[str, dict[str, Figure]]]
) -> list[dict[str, Any]]:
    """Of each two students, the later one minus the earlier, on every set, in what can be compared."""
    found = []
    students = [one for one in measured if not one.subject.is_teacher]
    for other, one in combinations(students, 2):
        for name, ours in figures[one.subject.name].items():
            theirs = figures[other.subject.name][name]
            keys = [key for key in ours if key in theirs]
            if one.subject.origin["tokenizer"] != other.subject.origin["tokenizer"]:
                keys = [key for key in keys if key in _WHATEVER_THE_TOKENS]
            if not keys:
                continue
            bootstrap = _bootstrap(one.subject.sets.rows(name), suite.resamples)
            parts = {key: asdict(bootstrap.difference(ours[key], theirs[key])) for key in keys}
            found.append({"set": name, "model": one.subject.name, "minus": other.subject.name, "figures": parts})
    return found


def _samples(suite: Suite, measured: Sequence[Measurement], name: str) -> list[dict[str, Any]]:
    prompts = measured[0].subject.sets.prompts[name]
    first = {one.subject.name: one.answers(name, suite.seeds[0]) for one in measured}
    return [
        {
            "prompt": prompts.prompts[row],
            "references": prompts.references[row],
            "responses": {model: answers[row].text for model, answers in first.items()},
        }
        for row in range(min(_SAMPLES, len(prompts.prompts)))
    ]
