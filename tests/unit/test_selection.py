"""Which student is kept, and when a run ends for want of a better one."""

import json
import math
from typing import Any

import pytest
from run_configs import change, problems, started

from distill.config import Config
from distill.evaluation.selection import Memory, Selection

NAN = math.nan


def follow(selection: Selection, figures: list[float]) -> tuple[list[float], int | None]:
    """The figures of the students kept, and how many validations the run lives through; its memory goes by JSON."""
    memory: Memory = {}
    best: float | None = None
    kept = []
    for number, figure in enumerate(figures, 1):
        score = selection.score(figure)
        if selection.is_better(score, best):
            best = score
            kept.append(figure)
        memory = json.loads(json.dumps(selection.look(score, memory), allow_nan=False))
        if selection.verdict(memory):
            return kept, number
    return kept, None


CASES: dict[str, tuple[Selection, list[float], list[float], int | None]] = {
    "more is better": (Selection("rouge_l", 0, 0), [1, 3, 2, 4], [1, 3, 4], None),
    "less is better": (Selection("loss", 0, 0), [3, 1, 2, 0], [3, 1, 0], None),
    "of a divergence too": (Selection("reverse_kl", 0, 0), [3, 1, 2], [3, 1], None),
    "no patience asked for": (Selection("loss", 0, 0), [1] * 9, [1], None),
    "two in a row": (Selection("loss", 2, 0), [3, 2, 2.5, 1.9, 2, 1.9, 0], [3, 2, 1.9], 6),
    "an equal figure is no better": (Selection("rouge_l", 1, 0), [5, 5], [5], 2),
    "never a better one": (Selection("loss", 3, 0), [1, 2, 3, 4, 0], [1], 4),
    # 1.9 and 1.8 are kept, and together they are an improvement that counts.
    "small steps add up": (Selection("loss", 2, 0.15), [2, 1.9, 1.8, 1.75, 1.7], [2, 1.9, 1.8, 1.75, 1.7], 5),
    "too small to count": (Selection("rouge_l", 2, 1), [5, 5.9, 6], [5, 5.9, 6], 3),
    "just enough": (Selection("rouge_l", 2, 1), [5, 5.9, 6.5, 6.6, 7], [5, 5.9, 6.5, 6.6, 7], 5),
    "no number": (Selection("loss", 3, 0), [2, NAN, 1, NAN, NAN, NAN], [2, 1], 6),
    "infinite": (Selection("loss", 2, 0), [2, math.inf, math.inf], [2], 3),
}


@pytest.mark.parametrize("case", CASES)
def test_the_best_is_kept_until_patience_ends(case: str) -> None:
    selection, figures, kept, lived = CASES[case]
    assert follow(selection, figures) == (kept, lived)


def test_a_student_of_a_number_beats_one_without() -> None:
    selection = Selection("loss", 2, 0)
    assert selection.is_better(-3.0, NAN)
    kept, lived = follow(selection, [NAN, NAN])
    assert [math.isnan(figure) for figure in kept] == [True, True], "any is better than none"
    assert lived == 2


def test_the_verdict_says_why() -> None:
    selection = Selection("loss", 2, 0.01)
    memory = selection.look(selection.score(1.25), {})
    assert selection.verdict(memory) is None
    for _ in range(2):
        memory = selection.look(selection.score(1.245), memory)
    assert selection.verdict(memory) == (
        "valid/loss has not improved by more than 0.01 in 2 validations since it was 1.25 (evaluation.patience)"
    )
    memory = Selection("rouge_l", 1, 0).look(NAN, {})
    assert Selection("rouge_l", 1, 0).verdict(memory) == (
        "valid/rouge_l has not improved in 1 validation to a number (evaluation.patience)"
    )


def test_more_patience_lets_a_run_go_on() -> None:
    """What stopped it is not kept, but what it has seen."""
    memory: Memory = {"bar": -1.0, "failed": 2}
    assert Selection("loss", 2, 0).verdict(memory)
    assert not Selection("loss", 3, 0).verdict(memory)
    assert not Selection("loss", 0, 0).verdict(memory)


AUTO = {
    "minillm": ("rouge_l", True),
    "kd": ("rouge_l", True),
    "sft": ("loss", False),
    "seqkd": ("loss", False),
    "uld": ("loss", False),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_is_what_the_objective_can_do_best(name: str, good: dict) -> None:
    config = Config.model_validate(good | {"objective": {"name": name}, "rollout": {}})
    assert (config.validation_metric, config.validation_samples) == AUTO[name]


def of(good: dict, objective: str, **evaluation: Any) -> dict:
    rollout: dict[str, Any] = {"per_round": 16} if objective == "minillm" else {}
    if objective == "minillm" or evaluation.get("metric") == "rouge_l":
        rollout["max_new_tokens"] = 16
    return good | {"objective": {"name": objective}, "rollout": rollout, "evaluation": evaluation}


def test_what_can_be_computed_is_accepted(good: dict) -> None:
    for metric in ("auto", "loss", "rouge_l", "reverse_kl"):
        assert problems(of(good, "minillm", metric=metric, seeds=3, every=1, patience=2, min_improvement=0.5)) == []
    for metric in ("auto", "loss", "rouge_l"):
        assert problems(of(good, "sft", metric=metric)) == []
    assert problems(of(good, "sft", metric="rouge_l", seeds=2)) == []


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no teacher": (
        "sft",
        {"metric": "reverse_kl"},
        "evaluation.metric = 'reverse_kl': objective sft has no teacher that reads the student's tokens; "
        "give loss or rouge_l",
    ),
    "a teacher of other tokens": (
        "uld",
        {"metric": "reverse_kl"},
        "evaluation.metric = 'reverse_kl': objective uld has no teacher that reads the student's tokens; "
        "give loss or rouge_l",
    ),
    "nothing sampled": (
        "sft",
        {"seeds": 2},
        "evaluation.seeds = 2: objective sft is validated by its loss, nothing is sampled; "
        "remove it, or give evaluation.metric=rouge_l",
    ),
    "nothing to be patient about": (
        "minillm",
        {"patience": 2},
        "evaluation.patience = 2: the run is validated at its end alone, which leaves nothing to be patient about; "
        "give evaluation.every, or remove it",
    ),
    "no patience": (
        "minillm",
        {"min_improvement": 0.1, "every": 2},
        "evaluation.min_improvement = 0.1: only evaluation.patience reads it; give evaluation.patience, or remove it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, good: dict) -> None:
    objective, evaluation, expected = REFUSED[case]
    found = problems(of(good, objective, **evaluation))
    assert [line for line in found if line.startswith("evaluation.")] == [expected]
    assert len(found) == 1 or objective == "uld", "which says besides that this teacher needs no uld"


def test_without_validation_records_nothing_can_be_chosen(good: dict) -> None:
    del good["data"]["valid"]
    found = problems(of(good, "minillm", metric="loss", seeds=2, patience=2, every=2))
    assert [line.split(":")[0] for line in found] == [
        "evaluation.metric = 'loss'",
        "evaluation.seeds = 2",
        "evaluation.patience = 2",
    ]
    assert all("there are no validation records; give data.valid, or remove it" in line for line in found)


def test_the_metric_stays_and_patience_may_change(good: dict) -> None:
    started(good, evaluation={"every": 1})
    assert problems(good | {"evaluation": {"every": 2, "patience": 3, "min_improvement": 0.1, "seeds": 2}}) == []
    assert problems(good | {"evaluation": {"metric": "rouge_l"}}) == [], "it is what auto comes to"
    (found,) = problems(good | {"evaluation": {"metric": "loss"}})
    assert "evaluation.metric = 'loss': the run in" in found
    assert found.endswith("was started with 'auto'; give the old value, or another run.folder")


def test_a_metric_that_samples_reads_how_to(good: dict) -> None:
    """The length of sequences is looked at too: prompts of 64 tokens, in a model of 256."""
    sampled = of(good, "sft", metric="rouge_l") | {"rollout": {"max_new_tokens": 300}}
    (found,) = problems(sampled)
    assert "rollout.max_new_tokens" in found
    unread = problems(change(sampled, "evaluation.metric", "loss"))
    assert unread == ["rollout.max_new_tokens = 300: objective sft does not read it; remove it"]
