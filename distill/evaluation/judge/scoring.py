"""Verdicts → figures with intervals, by models and set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.evaluation.judge.tasks import REFERENCE, Pair, Task
from distill.evaluation.judge.verdicts import Verdict
from distill.evaluation.statistics import Bootstrap, Estimate, ratio

Figures = dict[str, Estimate]


@dataclass
class Group:
    """The questions behind one row of a table: a model or two, on one set."""

    models: tuple[str, ...]
    set: str
    tasks: list[Task] = field(default_factory=list)


def groups(tasks: Sequence[Task], pairs: Sequence[Pair]) -> list[Group]:
    """Questions by what they tell of; a pair's two orders together."""
    found: dict[tuple[tuple[str, ...], str], Group] = {}
    for task in tasks:
        place = task.place
        names = {place.first, place.second} - {REFERENCE}
        models = next((pair for pair in pairs if set(pair) == names), tuple(names))
        found.setdefault((models, place.set), Group(models, place.set)).tasks.append(task)
    return list(found.values())


def of_scores(group: Group, verdict: Callable[[Task], Verdict | None], rows: int, bootstrap: Bootstrap) -> Figures:
    """Mean points of the model and of the reference, and `ratio`, Σ model / Σ reference (MiniLLM, Section 3.1).

    Rows of one prompt, with several seeds, are resampled together. Empty if there is no verdict.
    """
    model, reference, count = np.zeros((3, rows))
    for task in group.tasks:
        points = verdict(task)
        if points is not None:
            mine, other = points if task.place.second == REFERENCE else points[::-1]
            model[task.place.row] += mine
            reference[task.place.row] += other
            count[task.place.row] += 1
    if not count.any():
        return {}
    return {
        "score": bootstrap.of(ratio(model, count)),
        "reference": bootstrap.of(ratio(reference, count)),
        "ratio": bootstrap.of(ratio(model, reference)),
    }


def of_pairs(group: Group, verdict: Callable[[Task], Verdict | None], rows: int, bootstrap: Bootstrap) -> Figures:
    """How the first model of a pair does against the second, as shares of the comparisons judged in both orders.

    A comparison is worth the mean of its two orders to the first model, 1 for a win and ½ for a tie; `win_rate` is the
    mean of that, so that a judge that always takes what stands first gives ½. `wins`, `ties` and `losses` are worth
    more than ½, ½ and less. `disagreement`: the two orders gave different verdicts. Empty if there is no verdict.
    """
    names = ("win_rate", "wins", "ties", "losses", "disagreement")
    sums, count = np.zeros((len(names), rows)), np.zeros(rows)
    for row, one, other in _both_orders(group, verdict):
        worth = (one + other) / 2
        sums[:, row] += [worth, worth > 0.5, worth == 0.5, worth < 0.5, one != other]
        count[row] += 1
    if not count.any():
        return {}
    return {name: bootstrap.of(ratio(of, count)) for name, of in zip(names, sums, strict=True)}


def _both_orders(group: Group, verdict: Callable[[Task], Verdict | None]) -> Iterator[tuple[int, float, float]]:
    """Row, and what each order is worth to the first model."""
    model = group.models[0]
    worth: dict[tuple[int, int], list[float]] = {}
    for task in group.tasks:
        points = verdict(task)
        if points is not None:
            place = task.place
            worth.setdefault((place.seed, place.row), []).append(points[0 if place.first == model else 1])
    for (_, row), orders in worth.items():
        if len(orders) == 2:
            yield row, orders[0], orders[1]
