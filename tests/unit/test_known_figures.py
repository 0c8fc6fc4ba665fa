"""Figures of tokens and of choices, and what parts two models, against numbers worked out by hand."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill.evaluation.figures import curves, judged, of_answers, of_choices, of_text
from distill.evaluation.prompt_sets import ChoiceSet
from distill.evaluation.reading import ALONE, TO_TEACHER
from distill.evaluation.scores import Scores, Tokens
from distill.evaluation.statistics import Figure, mean
from distill.evaluation.suite import Suite
from distill.evaluation.summary import _differences, _estimates


def value_of(figure: Figure, rows: int) -> float:
    """The figure with every row once."""
    return float(figure(np.ones((1, rows)))[0])


def values_of(figures: dict[str, Figure], rows: int) -> dict[str, float]:
    return {name: value_of(figure, rows) for name, figure in figures.items()}


def tokens_of(**values: list[list[float]]) -> Tokens:
    return Tokens.of({name: [np.array(row) for row in rows] for name, rows in values.items()})


def test_measures_of_a_token_by_hand() -> None:
    """q is 9/10 and 1/10, p a half each; then both the other way round."""
    q, p = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    found = {name: measure([q, p], torch.tensor([1, 0])).tolist() for name, measure in TO_TEACHER.items()}
    first, second = 0.9 * math.log(1.8) + 0.1 * math.log(0.2), 0.5 * math.log(5) + 0.5 * math.log(5 / 9)
    assert found["reverse_kl"] == pytest.approx([first, second], rel=1e-5)
    turned = 0.5 * math.log(1 / 1.8) + 0.5 * math.log(5), 0.1 * math.log(0.2) + 0.9 * math.log(1.8)
    assert found["forward_kl"] == pytest.approx(turned, rel=1e-5)
    assert found["nll"] == pytest.approx([math.log(10), math.log(2)], rel=1e-5)
    assert found["teacher_nll"] == pytest.approx([math.log(2), math.log(10)], rel=1e-5)
    far = torch.tensor([[0.2, 0.8], [0.7, 0.3]]).log()
    assert TO_TEACHER["top1_agreement"]([q, far], torch.tensor([0, 0])).tolist() == [0, 1]
    assert ALONE["nll"]([far], torch.tensor([1, 0])).tolist() == pytest.approx([-math.log(0.8), -math.log(0.7)])


def test_figures_of_responses_weigh_rows_or_tokens() -> None:
    """Two prompts, two seeds; responses of three tokens and one, then of one and two."""
    rows = {
        "rouge_l": [[10.0, 20.0], [60.0, 30.0]],
        "exact_match": [[100.0, 0.0], [0.0, 0.0]],
        "length": [[3.0, 1.0], [1.0, 2.0]],
        "repetition": [[0.5, 0.0], [0.0, 0.0]],
        "ended": [[1.0, 1.0], [0.0, 1.0]],
    }
    own = tokens_of(
        reverse_kl=[[1, 2, 3], [10], [4], [6, 9]],
        top1_agreement=[[1, 0, 0], [0], [1], [0, 0]],
        teacher_nll=[[2, 2, 2], [5], [1], [0, 0]],
    )
    taught = tokens_of(forward_kl=[[8], [2, 2], [3, 5, 7], [1]], top1_agreement=[[1], [1, 0], [1, 1, 1], [0]])
    found = of_answers(Scores({name: np.array(of) for name, of in rows.items()}, own, taught))
    assert values_of(found, 2) == pytest.approx(
        {
            "rouge_l": 30,
            "exact_match": 25,
            "length": 7 / 4,
            "repetition": 0.125,
            "ended": 0.75,
            "reverse_kl": 35 / 7,
            "top1_on_own": 2 / 7,
            "teacher_nll": 12 / 7,
            "forward_kl": 28 / 7,
            "top1_agreement": 5 / 7,
        }
    )
    # A resample of the first prompt alone, twice: both seeds' responses to it.
    again = np.array([[2.0, 0.0]])
    assert found["rouge_l"](again)[0] == pytest.approx(35)
    assert found["reverse_kl"](again)[0] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert found["forward_kl"](again)[0] == pytest.approx((8 + 3 + 5 + 7) / 4)


def test_a_difference_is_the_later_student_minus_the_earlier_in_what_can_be_compared() -> None:
    """A figure that counts tokens cannot be, where tokenizers differ."""

    def measured(name: str, tokenizer: str, is_teacher: bool = False) -> Any:
        sets = SimpleNamespace(rows=lambda name: 2)
        origin = {"tokenizer": tokenizer}
        return SimpleNamespace(subject=SimpleNamespace(name=name, origin=origin, sets=sets, is_teacher=is_teacher))

    def figures(rouge: float, length: float) -> dict[str, dict[str, Figure]]:
        rows = {"rouge_l": np.array([[rouge, rouge]]), "length": np.array([[length, length]])}
        return {"s": of_answers(Scores(rows))}

    models = [measured("t", "x", is_teacher=True), measured("a", "x"), measured("b", "x"), measured("c", "y")]
    given = {"t": figures(90, 1), "a": figures(10, 5), "b": figures(14, 3), "c": figures(40, 9)}
    suite = Suite.model_validate({"sets": {"s": "unused.jsonl"}, "resamples": 200})
    found = {(one["model"], one["minus"]): one["figures"] for one in _differences(suite, models, given)}
    values = {pair: {name: one["value"] for name, one in of.items()} for pair, of in found.items()}
    assert values == {
        ("b", "a"): {"rouge_l": 4, "length": -2},
        ("c", "a"): {"rouge_l": 30},
        ("c", "b"): {"rouge_l": 26},
    }
    assert (found["b", "a"]["rouge_l"]["low"], found["b", "a"]["rouge_l"]["high"]) == (4, 4)


def test_calibration_has_the_interval_of_what_resampling_makes_larger() -> None:
    """The percentile interval turned round the value, where other figures have it as it is."""
    values = np.array([1.0, 2.0, 3.0, 10.0])
    sets = SimpleNamespace(rows=lambda name: 4, prompts={})
    one, suite = SimpleNamespace(subject=SimpleNamespace(sets=sets)), Suite(choices={"c": Path("unused.jsonl")})
    found = _estimates(suite, one, {"c": dict.fromkeys(("accuracy", "ece"), mean(values))})["c"]  # type: ignore[arg-type]
    assert found["accuracy"]["value"] == found["ece"]["value"] == 4
    low, high = found["accuracy"]["low"], found["accuracy"]["high"]
    assert 1 < low < 3
    assert 5 < high <= 8
    assert (found["ece"]["low"], found["ece"]["high"]) == pytest.approx((8 - high, 8 - low))


def test_perplexity_is_of_all_tokens_alike() -> None:
    tokens = tokens_of(nll=[np.log([2.0, 2.0, 2.0]).tolist(), [math.log(8)]])
    assert value_of(of_text(tokens)["perplexity"], 2) == pytest.approx(2**1.5)


def test_choices_are_judged_by_their_tokens_probability() -> None:
    questions = ChoiceSet([([0], [0])] * 5, [0, 2], [2, 3], [1, 0])
    # Choices of 1 to 2 tokens: −log 0.2, −log 0.6; then −log 0.5·0.2, −log 0.1, −log 0.2.
    nll = tokens_of(nll=[[math.log(5)], [-math.log(0.6)], [math.log(2), math.log(5)], [math.log(10)], [math.log(5)]])
    right, confidence = judged(nll, questions)
    assert right.tolist() == [1, 0]
    assert confidence == pytest.approx([0.75, 0.5])
    # Two bins, one question each: |1 − 0.75| / 2 + |0 − 0.5| / 2.
    assert values_of(of_choices(nll, questions), 2) == pytest.approx({"accuracy": 0.5, "ece": 0.375})


def test_calibration_is_of_bins_in_which_errors_of_both_signs_cancel() -> None:
    """Of 15 bins [10/15, 11/15) holds 0.70 right and 0.68 wrong, the last 0.95 and 1 right, one below 0.65 right."""
    sure, right = [0.70, 0.68, 0.95, 1 - 1e-15, 0.65], [1, 0, 1, 1, 1]
    nll = tokens_of(nll=[[-math.log(part)] for one in sure for part in (one, max(1 - one, 1e-300))])
    answers = [0 if one else 1 for one in right]
    questions = ChoiceSet([([0], [0])] * 10, list(range(0, 10, 2)), [2] * 5, answers)
    ece = (abs((1 - 0.70) + (0 - 0.68)) + abs((1 - 0.95) + 0) + abs(1 - 0.65)) / 5
    assert values_of(of_choices(nll, questions), 5) == pytest.approx({"accuracy": 4 / 5, "ece": ece})


def test_excess_error_by_hand() -> None:
    """Two positions, as many rows as there are; a third position only one row has."""
    own = tokens_of(forward_kl=[[1, 3], [3, 5, 7]], reverse_kl=[[2, 2], [4, 6, 8]])
    taught = tokens_of(forward_kl=[[1, 2], [1, 4]], reverse_kl=[[0, 0], [0, 0]])
    assert curves(Scores(own=own, taught=taught)) == {
        "forward_kl_after_own": [2, 4],
        "forward_kl_after_teachers": [1, 3],
        "reverse_kl_after_own": [3, 4],
        # R is 2 and 6, lε 1 and 4.
        "excess_accumulated_error": [100, 50],
        "rows": [2, 2],
    }
    assert curves(Scores()) == {}


def test_a_curve_ends_where_fewer_than_ten_rows_go_on() -> None:
    own = tokens_of(
        forward_kl=[[1] * (2 + row // 3) for row in range(14)], reverse_kl=[[1] * (2 + row // 3) for row in range(14)]
    )
    # Three rows each of 2, 3, 4 and 5 tokens and two of 6: 14 reach the second position, 11 the third, 8 the fourth.
    assert curves(Scores(own=own, taught=own))["rows"] == [14, 14, 11]
