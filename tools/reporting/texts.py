"""Text to read: held-out responses side by side, and rollouts of the first and the last round of training."""

from collections.abc import Mapping
from itertools import zip_longest

from distill.evaluation.subjects import TEACHER
from tools.reporting.evaluations import Evaluation, Sample
from tools.reporting.markup import esc, folded, number, tag
from tools.reporting.runs import Rollout, Run

Colours = Mapping[str, int]
_SHOWN, _LONGEST, _ROLLOUTS = 4, 4000, 3


def samples(evaluation: Evaluation, set_name: str, colours: Colours) -> str:
    """The first few at once, the others folded."""
    found = evaluation.content.samples.get(set_name, [])
    cards = [_sample(sample, colours) for sample in found]
    rest = cards[_SHOWN:]
    return "".join(cards[:_SHOWN]) + (folded(f"{len(rest)} more prompts", "".join(rest)) if rest else "")


def _sample(sample: Sample, colours: Colours) -> str:
    students = [name for name in sample.responses if name != TEACHER]
    order = [*students, *(name for name in sample.responses if name == TEACHER)]
    columns = [_answer(tag(name, colours.get(name, -1)), sample.responses[name]) for name in order]
    for number_, reference in enumerate(sample.references, 1):
        label = "reference" if len(sample.references) == 1 else f"reference {number_}"
        columns.append(_answer(f"<span class=name>{label}</span>", reference))
    return f"<article><p class=prompt>{_text(sample.prompt)}</p><div class=answers>{''.join(columns)}</div></article>"


def _answer(label: str, text: str, under: str = "") -> str:
    return f"<section><h4>{label}</h4><p>{_text(text) or '<em>nothing</em>'}</p>{under}</section>"


def _text(text: str) -> str:
    """Escaped; of a very long one the beginning, with a word about the rest."""
    text = text.strip("\n")
    if len(text) <= _LONGEST:
        return esc(text)
    return f"{esc(text[:_LONGEST])} <em>… {len(text) - _LONGEST} characters more</em>"


def rollouts(run: Run, colours: Colours) -> str:
    """A few of the first round on record beside as many of the last; nothing where there is one round at most."""
    steps = sorted({rollout.step for rollout in run.rollouts})
    if len(steps) < 2:
        return ""
    first, last = ([one for one in run.rollouts if one.step == step][:_ROLLOUTS] for step in (steps[0], steps[-1]))
    heads = [f"<h4>{tag(run.name, colours[run.name])} step {step}</h4>" for step in (steps[0], steps[-1])]
    cells = [f"<section>{_rollout(one)}</section>" for pair in zip_longest(first, last) for one in pair]
    return f"<article class=rollouts><div class=pairs>{''.join(heads)}{''.join(cells)}</div></article>"


def _rollout(rollout: Rollout | None) -> str:
    if rollout is None:
        return ""
    facts = []
    if rollout.reward is not None:
        facts.append(f"reward {number(rollout.reward, 2, signed=True)}")
    if rollout.teacher_share is not None:
        facts.append(f"{number(100 * rollout.teacher_share, 0)} % drawn by the teacher")
    under = f"<small>{' · '.join(facts)}</small>" if facts else ""
    return f"<p class=asked>{_text(rollout.prompt)}</p><p>{_text(rollout.response)}</p>{under}"
