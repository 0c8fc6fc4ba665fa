"""Evaluation without ranks: sets, answer files, scores and the figures made of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from distill.config import ModelSettings
from distill.errors import BadInput
from distill.evaluation.answers import Answer, AnswerFile, batches
from distill.evaluation.figures import curves, diversity, judged, of_answers, of_choices, of_text
from distill.evaluation.prompt_sets import ChoiceSet, PromptSet, read_choices, read_prompts, read_text
from distill.evaluation.scores import Scores, Tokens
from distill.evaluation.statistics import Bootstrap
from distill.evaluation.subjects import subjects
from distill.evaluation.suite import Suite, load_suite
from distill.evaluation.summary import _differences
from distill.evaluation.table import markdown_table, terminal_tables
from distill.evaluation.text import distinct, exact_match

Write = Callable[..., Path]


@pytest.fixture
def lines(tmp_path: Path) -> Write:
    def write(*records: Any, name: str = "set.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def suite(**changes: Any) -> Suite:
    return Suite.model_validate({"sets": {"s": "unused.jsonl"}} | changes)


# Sets


def test_prompts_keep_order_and_all_references(lines: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = lines({"instruction": "b", "input": "c", "output": ["x", "y"]}, {"prompt": "a", "output": "z"})
    found = read_prompts("s", path, suite(template="plain"), tokenizer)
    assert found.prompts == ["b\n\nc", "a"]
    assert found.references == [["x", "y"], ["z"]]
    assert [tokenizer.decode(ids) for ids in found.prompt_ids] == ["b\n\nc\n\n", "a"]


def test_a_hash_tells_other_prompts_and_not_other_references(lines: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    def of(prompt: str, output: str) -> PromptSet:
        return read_prompts("s", lines({"prompt": prompt, "output": output}), suite(), tokenizer)

    assert of("a", "x").content == of("a", "y").content != of("b", "x").content
    assert of("a", "x").references_hash != of("a", "y").references_hash


def test_text_is_cut_into_pieces_of_which_all_tokens_but_the_first_are_predicted(
    lines: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = lines({"text": "one two three four five six"}, {"text": "seven"})
    found = read_text("t", path, suite(context=4), tokenizer)
    ids = [tokenizer.encode("one two three four five six"), tokenizer.encode("seven")]
    pieces = [part for one in ids for k in range(0, len(one), 4) if len(part := one[k : k + 4]) > 1]
    assert [prompt + rest for prompt, rest in found.rows] == pieces
    assert all(len(prompt) == 1 and rest for prompt, rest in found.rows)


def test_choices_lie_one_after_the_other(lines: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = lines(
        {"prompt": "q", "choices": ["yes", "no"], "answer": 1}, {"prompt": "r", "choices": ["a"] * 3, "answer": 0}
    )
    found = read_choices("c", path, suite(), tokenizer)
    assert (found.first, found.counts, found.answers) == ([0, 2], [2, 3], [1, 0])
    assert [tokenizer.decode(choice) for _, choice in found.rows] == ["yes", "no", "a", "a", "a"]


def test_a_suite_reads_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("sets: {a: a.jsonl}\nseeds: [1, 2]\n")
    found = load_suite(path, ["temperature=0.5", "seeds=[3]"])
    assert (found.temperature, found.seeds, found.sets) == (0.5, (3,), {"a": Path("a.jsonl")})
    assert found.sampling.alpha == 0
    assert found.sampling.temperature == 0.5


PROMPT = {"prompt": "a", "output": "b"}


@pytest.mark.parametrize(
    ("kind", "records", "expected"),
    [
        ("sets", [], "sets.s = 'PATH': holds no lines"),
        ("sets", [{"output": "b"}], "sets.s = 'PATH:1': needs 'instruction', 'prompt' or 'messages'"),
        ("sets", [PROMPT, {"prompt": "c"}], "sets.s = 'PATH:2': has no reference, 1 other lines have"),
        ("sets", [{"prompt": "word " * 80}], "sets.s = 'PATH:1': 162 prompt tokens; raise max_prompt"),
        (
            "sets",
            [{"messages": [{"role": "user", "content": "a"}] * 2}],
            "a conversation of 2 turns needs TEMPLATE=chat",
        ),
        ("choices", [{"prompt": "a", "choices": ["x"], "answer": 0}], "must be a list of two texts or more"),
        ("choices", [{"prompt": "a", "choices": ["x", "y"], "answer": 2}], "must be the place of a choice, 0 to 1"),
        ("choices", [{"prompt": "a", "choices": ["x", "y"], "answer": True}], "must be the place of a choice"),
        ("choices", [{"prompt": "a", "choices": ["x", ""], "answer": 0}], "'' has no token"),
        ("texts", [{"txt": "a"}], "texts.s = 'PATH:1': needs a 'text'"),
        ("texts", [{"text": ""}], "texts.s = 'PATH': holds no text"),
    ],
)
def test_a_bad_line_is_named(
    kind: str, records: list[Any], expected: str, lines: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = lines(*records)
    read: Any = {"sets": read_prompts, "choices": read_choices, "texts": read_text}[kind]
    with pytest.raises(BadInput) as caught:
        read("s", path, suite(max_prompt=100, template="plain"), tokenizer)
    assert expected.replace("PATH", str(path)) in str(caught.value)


# Answers

ORIGIN = {"model": "m", "seed": 1}


def answers(*rows: int) -> list[Answer]:
    return [Answer(row, f"text {row}", [row, row + 1], row % 2 == 0) for row in rows]


def test_answers_of_all_ranks_become_one_file_in_order(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "m/s.seed-1.jsonl", ORIGIN, 4)
    file.append(0, answers(3, 0))
    assert file.complete() is None
    file.append(1, answers(1))
    file.append(1, answers(2))
    assert file.complete() == answers(0, 1, 2, 3)
    file.merge()
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["s.seed-1.jsonl"]
    assert AnswerFile(file.path, ORIGIN, 4).complete() == answers(0, 1, 2, 3)


def test_a_line_that_a_kill_cut_off_is_asked_again(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "s.seed-1.jsonl", ORIGIN, 3)
    file.append(0, answers(0, 1))
    part = tmp_path / "s.seed-1.rank-0.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    assert list(file.read()) == [0]
    file.trim(0)
    file.append(0, answers(1, 2))
    assert file.complete() == answers(0, 1, 2)


@pytest.mark.parametrize("cut", [0, 3])
def test_a_part_whose_first_line_was_cut_off_begins_anew(cut: int, tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "s.seed-1.jsonl", ORIGIN, 1)
    (tmp_path / "s.seed-1.rank-0.jsonl").write_bytes(json.dumps(ORIGIN).encode()[:cut])
    assert file.read() == {}
    file.trim(0)
    file.append(0, answers(0))
    assert file.complete() == answers(0)


def test_answers_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    AnswerFile(tmp_path / "s.seed-1.jsonl", ORIGIN, 1).append(0, answers(0))
    with pytest.raises(BadInput, match=r"holds responses made otherwise \(model\); give another folder"):
        AnswerFile(tmp_path / "s.seed-1.jsonl", ORIGIN | {"model": "n"}, 1).read()


def test_batches_depend_on_the_set_alone_and_hold_every_row_once() -> None:
    prompts = PromptSet([[1] * n for n in (3, 1, 4, 1, 5)], ["p"] * 5, [[]] * 5)
    assert batches(prompts, 2) == [[4, 2], [0, 1], [3]]


# Scores and figures


def test_scores_come_back_and_those_of_another_origin_do_not(tmp_path: Path) -> None:
    path = tmp_path / "m/s.scores.safetensors"
    tokens = Tokens.of({"nll": [np.array([1.0, 2.0]), np.array([3.0])]})
    Scores({"length": np.array([[1.0, 2.0]])}, own=tokens).save(path, {"seed": [1]})
    found = Scores.load(path, {"seed": [1]})
    assert found is not None
    assert found.rows["length"].tolist() == [[1, 2]]
    assert found.own is not None
    assert found.own.lengths.tolist() == [2, 1]
    assert found.own.values["nll"].tolist() == [1, 2, 3]
    assert found.taught is None
    assert Scores.load(path, {"seed": [2]}) is None
    path.write_bytes(path.read_bytes()[:50])
    assert Scores.load(path, {"seed": [1]}) is None


def test_sums_by_row_add_up_seeds_and_take_empty_rows() -> None:
    tokens = Tokens(np.array([2, 0, 1, 3]), {"x": np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])})
    assert tokens.sums("x", 4).tolist() == [3, 0, 4, 56]
    assert tokens.sums("x", 2).tolist() == [7, 56]
    assert tokens.counts(2).tolist() == [3, 3]
    assert np.nansum(tokens.by_position("x"), 0).tolist() == [1 + 4 + 8, 2 + 16, 32]


def sampled(generator: np.random.Generator, own: float, taught: float, rows: int = 40) -> Scores:
    def tokens(scale: float) -> Tokens:
        lengths = generator.integers(3, 9, rows)
        names = ("reverse_kl", "forward_kl", "top1_agreement", "nll", "teacher_nll")
        return Tokens(lengths, {name: generator.exponential(scale, lengths.sum()) for name in names})

    text = {name: generator.normal(10, 2, (2, rows)) for name in ("rouge_l", "exact_match", "repetition", "ended")}
    return Scores(text | {"length": np.full((2, rows), 6.0)}, tokens(own), tokens(taught))


def test_a_models_figures_are_means_over_rows_and_over_tokens() -> None:
    scores = sampled(np.random.default_rng(0), 1.0, 2.0)
    assert scores.own is not None
    assert scores.taught is not None
    found = {name: Bootstrap(40, 500).of(figure) for name, figure in of_answers(scores).items()}
    assert found["rouge_l"].value == pytest.approx(scores.rows["rouge_l"].mean())
    assert found["reverse_kl"].value == pytest.approx(scores.own.values["reverse_kl"].mean())
    assert found["forward_kl"].value == pytest.approx(scores.taught.values["forward_kl"].mean())
    assert found["top1_agreement"].value == pytest.approx(scores.taught.values["top1_agreement"].mean())
    assert all(one.low <= one.value <= one.high for one in found.values())
    assert found["rouge_l"].low < found["rouge_l"].high


def test_diversity_is_that_of_each_seed_by_itself() -> None:
    ids = [list(range(row, row + 6)) for row in range(40)]
    assert diversity([ids, ids]) == diversity([ids])
    assert diversity([ids])["dist_1"].value == pytest.approx(45 / 240)


def test_a_difference_of_figures_has_their_sign() -> None:
    generator = np.random.default_rng(1)
    near, far = sampled(generator, 1.0, 1.0), sampled(generator, 2.0, 1.0)
    one, other, bootstrap = of_answers(far), of_answers(near), Bootstrap(40, 500)
    assert bootstrap.difference(one["reverse_kl"], other["reverse_kl"]).low > 0
    alike = bootstrap.difference(one["forward_kl"], other["forward_kl"])
    assert alike.low < 0 < alike.high


def test_distinct_against_counting_by_hand() -> None:
    responses = [[1, 2, 1, 2], [1, 2, 3], [9]]
    found = distinct(responses, 2)
    # 12 21 12 · 12 23 · none
    assert found.value == 3 / 5
    brute = [
        len(grams := [tuple(r[i : i + 2]) for k, r in enumerate(responses) if k != out for i in range(len(r) - 1)])
        and len(set(grams)) / len(grams)
        for out in range(3)
    ]
    error = math.sqrt(2 / 3 * sum((one - sum(brute) / 3) ** 2 for one in brute))
    assert found.high - found.value == pytest.approx(1.96 * error)
    assert distinct([[1], [2]], 2).value == 0


@pytest.mark.parametrize(
    ("text", "reference", "hit"),
    [
        ("Yes", "yes", 100),
        (" yes. ", "yes", 100),
        ("“YES!”", "yes", 100),
        ("no  way", "No\nway", 100),
        ("yes sir", "yes", 0),
        ("", "...", 0),
        ("-5", "5", 0),
        ("C++", "C#", 0),
        ("x > 3", "x < 3", 0),
    ],
)
def test_exact_match_forgives_case_and_what_stands_around(text: str, reference: str, hit: float) -> None:
    assert exact_match(text, ["another", reference]) == hit


def test_a_sequence_beyond_a_model_s_context_is_refused(lines: Write, models_dir: Path) -> None:
    """256 positions, as its configuration says."""
    path = lines({"prompt": "a word"})
    models = {"m": ModelSettings(path=str(models_dir / "student"))}
    fitting = suite(template="plain", sets={"s": str(path)}, max_new_tokens=200)
    assert subjects(fitting, models)[0].sets.longest(fitting)["s"] < 256
    with pytest.raises(BadInput, match=r"set = 's': sequences may reach 30\d tokens, the context of m has 256; lower"):
        subjects(suite(template="plain", sets={"s": str(path)}, max_new_tokens=300), models)


def test_models_of_different_tokenizers_differ_only_in_what_counts_no_tokens() -> None:
    def measured(name: str, tokenizer: str) -> Any:
        sets = SimpleNamespace(rows=lambda name: 40)
        return SimpleNamespace(
            subject=SimpleNamespace(name=name, origin={"tokenizer": tokenizer}, sets=sets, is_teacher=False)
        )

    figures = {name: {"s": of_answers(sampled(np.random.default_rng(0), 1.0, 1.0))} for name in ("a", "b", "c")}
    models = [measured("a", "x"), measured("b", "x"), measured("c", "y")]
    found = _differences(suite(resamples=200, sets={"s": "s"}), models, figures)
    keys = {(one["model"], one["minus"]): set(one["figures"]) for one in found}
    assert keys["b", "a"] == set(figures["a"]["s"])
    assert keys["c", "a"] == keys["c", "b"] == {"rouge_l", "exact_match"}


def test_perplexity_is_of_all_tokens_alike() -> None:
    tokens = Tokens.of({"nll": [np.log([2.0, 2.0, 2.0]), np.log([8.0])]})
    assert Bootstrap(2, 200).of(of_text(tokens)["perplexity"]).value == pytest.approx(2**1.5)


def test_choices_are_judged_by_their_tokens_probability() -> None:
    questions = ChoiceSet([([0], [0])] * 5, [0, 2], [2, 3], [1, 0])
    # Choices of 1 to 2 tokens: −log 0.2, −log 0.6; then −log 0.5·0.2, −log 0.1, −log 0.2.
    nll = [np.log([5.0]), np.log([1 / 0.6]), np.log([2.0, 5.0]), np.log([10.0]), np.log([5.0])]
    right, confidence = judged(Tokens.of({"nll": nll}), questions)
    assert right.tolist() == [1, 0]
    assert confidence == pytest.approx([0.75, 0.5])
    found = {
        name: Bootstrap(2, 200).of(figure) for name, figure in of_choices(Tokens.of({"nll": nll}), questions).items()
    }
    assert found["accuracy"].value == 0.5
    # Two bins, one question each: |1 − 0.75| / 2 + |0 − 0.5| / 2.
    assert found["ece"].value == pytest.approx(0.375)


def test_a_calibrated_model_has_a_small_ece() -> None:
    generator = np.random.default_rng(0)
    sure = generator.uniform(0.5, 1, 4000)
    answer = (generator.random(4000) > sure).astype(int).tolist()
    nll = [np.array([-math.log(p)]) for one in sure for p in (one, 1 - one)]
    questions = ChoiceSet([([0], [0])] * 8000, list(range(0, 8000, 2)), [2] * 4000, answer)
    bootstrap = Bootstrap(4000, 100)
    assert bootstrap.of(of_choices(Tokens.of({"nll": nll}), questions)["ece"]).value < 0.03
    wrong = ChoiceSet(questions.rows, questions.first, questions.counts, [1 - one for one in answer])
    assert bootstrap.of(of_choices(Tokens.of({"nll": nll}), wrong)["ece"]).value > 0.3


def test_the_interval_of_a_figure_that_resampling_makes_larger_holds_it() -> None:
    """That of calibrated models: its percentile interval lies above it in every fifth sample."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        sure = generator.uniform(0.5, 1, 300)
        gap = np.zeros((300, 15))
        gap[np.arange(300), (sure * 15).astype(int).clip(0, 14)] = (generator.random(300) < sure) - sure
        ece = lambda weights, gap=gap: np.abs(weights @ gap).sum(1) / weights.sum(1)  # noqa: E731
        bootstrap = Bootstrap(300, 300)
        found, plain = bootstrap.of_biased(ece), bootstrap.of(ece)
        assert 0 <= found.low <= found.value <= found.high or plain.low > 2 * found.value
        assert found.low < plain.low


def test_excess_error_by_hand() -> None:
    """Two positions, as many rows as there are; a third position only one row has."""

    def tokens(rows: list[list[float]]) -> Tokens:
        return Tokens.of({"forward_kl": list(map(np.array, rows)), "reverse_kl": list(map(np.array, rows))})

    own, taught = tokens([[1.0, 3.0], [3.0, 5.0, 7.0]]), tokens([[1.0, 2.0], [1.0, 2.0]])
    found = curves(Scores(own=own, taught=taught))
    assert found["forward_kl_after_own"] == [2, 4]
    assert found["forward_kl_after_teachers"] == [1, 2]
    # R is 2 and 6, lε 1 and 3.
    assert found["excess_accumulated_error"] == [100, 100]
    assert found["rows"] == [2, 2]
    assert curves(Scores()) == {}


def test_tables_show_intervals_of_what_was_measured() -> None:
    estimate = {"value": 12.34, "low": 11.0, "high": 13.5}
    of_a = {"dolly": {"rouge_l": estimate}, "wiki": {"perplexity": estimate}}
    evaluation = {
        "suite": {"sets": {"dolly": "x"}, "choices": {}, "texts": {"wiki": "y"}},
        "figures": {"a": of_a, "b": {"dolly": {}, "wiki": {}}},
    }
    assert markdown_table(evaluation, "dolly").splitlines()[2:] == ["| a | 12.3 [11.0, 13.5] |", "| b | – |"]
    text = terminal_tables(evaluation)
    assert text.startswith("dolly\n")
    assert "12.34 [11.00, 13.50]" in text
