"""What a report points out, and what it has no cause to."""

from pathlib import Path
from typing import Any

import pytest
from reports import difference, estimate, evaluation, figures, make_run, records, write_evaluation

from tools.reporting.evaluations import Evaluation, read_evaluation
from tools.reporting.findings import NEVER_ALONE, findings, headline, of_evaluation, of_run
from tools.reporting.runs import Run, read_run

Records = list[dict[str, float]]


def run(folder: Path, given: Records, **settings: Any) -> Run:
    return read_run(make_run(folder / "r", given, settings or None), "r")


def told(folder: Path, given: Records, **settings: Any) -> list[str]:
    return [finding.text for finding in of_run(run(folder, given, **settings))]


def rollouts(lengths: list[float], distinct: float = 1.0) -> Records:
    figures_ = {"loss/total": 1.0, "rollout/eos_rate": 1.0, "rollout/distinct_4": distinct}
    return [
        {"step": step, "rollout/response_length": length, "student/reverse_kl": 2 - step / 100} | figures_
        for step, length in enumerate(lengths, 1)
    ]


def validations(*points: tuple[float, float, float]) -> Records:
    """Rouge-L, KL and length, every ten steps."""
    return [
        {"step": 10 * place, "valid/rouge_l": rouge, "valid/reverse_kl": kl, "valid/mean_length": length}
        for place, (rouge, kl, length) in enumerate(points, 1)
    ]


def test_nothing_is_said_of_a_sound_run(tmp_path: Path) -> None:
    sound = records() + rollouts([40.0] * 60) + validations((10, 2, 40), (12, 1.5, 38), (13, 1.2, 35))
    assert told(tmp_path, sound, optim={"steps": 60}) == []


def test_skipped_steps_are_counted(tmp_path: Path) -> None:
    counts = {1: (0, 0), 2: (1, 1), 3: (2, 2), 4: (2, 0)}
    given: Records = [
        {"step": step, "fault/skipped_steps": so_far, "fault/skipped_in_a_row": row}
        for step, (so_far, row) in counts.items()
    ]
    assert told(tmp_path, given) == ["2 steps were skipped, up to 2 in a row: a number in them was not finite."]


def test_alarms_are_found_again_in_the_records(tmp_path: Path) -> None:
    (short, shrunk) = told(tmp_path, rollouts([40.0] * 10 + [8.0] * 60))
    assert short.startswith(
        "Length collapse at step 11: responses have 8.0 tokens on average: 40.0 in the first rounds"
    )
    assert "It came again 1 times, last at step 62." in short
    assert NEVER_ALONE in shrunk
    (repeating,) = told(tmp_path / "b", rollouts([40.0] * 3, distinct=0.4))
    assert repeating.startswith("Repetitive responses at step 1: of a response's 4-grams only 0.40 are distinct")
    assert not told(tmp_path / "c", rollouts([40.0] * 3, distinct=0.4), fault={"min_distinct": 0.0})
    leap: Records = [{"step": step, "loss/total": 1.0 + step % 2 / 10} for step in range(1, 30)]
    (spike,) = told(tmp_path / "d", [*leap, {"step": 30, "loss/total": 9.0}])
    assert spike.startswith("Loss spike at step 30: loss/total leapt to 9")


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            [(10, 2.0, 40), (15, 1.5, 40), (12, 1.0, 40)],
            "after step 20 validation KL(q‖p) went on falling (1.500 → 1.000)",
        ),
        (
            [(10, 2.0, 40), (15, 1.5, 40), (15, 1.0, 10)],
            "validation KL(q‖p) fell (2.000 → 1.000) while responses shrank",
        ),
        ([(10, 2.0, 40), (15, 1.5, 40), (12, 1.6, 40)], None),
        ([(10, 2.0, 40), (15, 1.5, 40), (14.9, 1.0, 30)], None),
        ([(10, 1.0, 40), (15, 1.5, 40), (15, 2.0, 10)], None),
    ],
)
def test_reverse_kl_is_never_a_success_by_itself(
    tmp_path: Path, points: list[tuple[float, float, float]], said: str | None
) -> None:
    found = told(tmp_path, validations(*points))
    assert [NEVER_ALONE in text and said is not None and said in text for text in found] == [True] * (said is not None)


def test_an_unfinished_run_is_a_note(tmp_path: Path) -> None:
    (finding,) = of_run(run(tmp_path, records(12), optim={"steps": 60, "max_minutes": None}))
    assert (finding.text, finding.is_warning) == ("stands at step 12 of 60.", False)
    assert not told(tmp_path / "b", records(12), optim={"steps": 60, "max_minutes": 5.0})


def judged(folder: Path, measured: dict[str, Any], **pairs: dict[str, Any]) -> Evaluation:
    """`pairs`: of b minus a."""
    of = [{"set": "held-out", "model": "b", "minus": "a", "figures": pairs}] if pairs else []
    return read_evaluation(write_evaluation(folder / "e", evaluation(measured, of)))


def test_closer_by_kl_and_worse_by_rouge_is_pointed_out(tmp_path: Path) -> None:
    measured = figures(teacher=(20, 0), a=(15, 2), b=(10, 1))
    found = judged(tmp_path, measured, rouge_l=difference(-5.0), reverse_kl=difference(-1.0))
    (finding,) = of_evaluation(found)
    assert finding.subject == "b"
    assert finding.text == (
        f"on held-out it has a lower KL(q‖p) than a (−1.000), but a lower Rouge-L too (−5.0): {NEVER_ALONE}."
    )
    unsure = judged(tmp_path, measured, rouge_l=difference(-5.0, 6.0), reverse_kl=difference(-1.0))
    assert not list(of_evaluation(unsure))


def test_short_and_repeated_text_is_pointed_out(tmp_path: Path) -> None:
    measured = figures(teacher=(20, 0), a=(15, 2), b=(10, 1))
    measured["a"]["held-out"] |= {"repetition": estimate(0.3, 0.05)}
    measured["b"]["held-out"] |= {"length": estimate(9.0), "repetition": estimate(0.21, 0.05)}
    assert {(one.subject, one.text) for one in of_evaluation(judged(tmp_path, measured))} == {
        ("a", "of its 4-grams on held-out 30 % stood before in the same response."),
        ("b", "its responses to held-out have 9.0 tokens, those of the teacher 20.0."),
    }


def test_the_headline_says_how_sure_it_is(tmp_path: Path) -> None:
    measured = figures(teacher=(20, 0), a=(10, 2), b=(15, 1))
    sure, unsure = (judged(tmp_path, measured, rouge_l=difference(5.0, spread)) for spread in (1.0, 6.0))
    reached, chance = "15.0 [14.5, 15.5]", "(95 % intervals). The teacher itself has 20.0."
    assert headline([], [sure]) == (
        f"b comes closest to the references of held-out: Rouge-L {reached}; its lead over every other student is "
        f"beyond chance {chance}"
    )
    expected = f"b has the highest Rouge-L on held-out, {reached}, but its lead over a may be chance {chance}"
    assert headline([], [unsure]) == expected
    alone = judged(tmp_path, figures(teacher=(20, 0), a=(10, 2)))
    expected = "a reaches Rouge-L 10.0 [9.5, 10.5] on held-out. The teacher itself has 20.0."
    assert headline([], [alone]) == expected


def test_without_references_the_headline_is_of_distance(tmp_path: Path) -> None:
    measured = figures(teacher=(20, 0), a=(10, 2), b=(15, 1))
    for of_model in measured.values():
        del of_model["held-out"]["rouge_l"]
    expected = "b is nearest to the teacher on held-out: KL(q‖p) 1.000 [0.950, 1.050] nats a token of its own text; "
    assert headline([], [judged(tmp_path, measured)]) == expected + NEVER_ALONE + "."


def test_without_an_evaluation_the_headline_is_of_validation(tmp_path: Path) -> None:
    scored = run(tmp_path, validations((10, 2, 40), (15, 1, 40), (12, 1, 40)))
    assert headline([scored], []).startswith("The best validation Rouge-L is 15.0, of r at step 20.")
    plain = run(tmp_path / "b", [{"step": 1, "valid/loss": 2.0}, {"step": 2, "valid/loss": 1.5}])
    assert headline([plain], []).startswith("The lowest validation loss is 1.500, of r at step 2.")


def test_warnings_stand_first(tmp_path: Path) -> None:
    given = [{"step": 1, "fault/skipped_steps": 1.0, "loss/total": 1.0}]
    found = findings([run(tmp_path, records(3), optim={"steps": 9}), run(tmp_path / "b", given)], [])
    assert [one.is_warning for one in found] == [True, False]
