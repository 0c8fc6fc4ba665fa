"""Evaluation without ranks: sets, answer files, scores and the figures made of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from distill.config import ModelSettings, RolloutSettings
from distill.errors import BadInput
from distill.evaluation.answers import Answer, AnswerFile, batches
from distill.evaluation.prompt_sets import PromptSet, read_choices, read_prompts, read_text
from distill.evaluation.scores import Scores, Tokens
from distill.evaluation.subjects import _weights, subjects
from distill.evaluation.suite import Suite, load_suite
from distill.evaluation.table import markdown_table, terminal_tables

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
    """Where there is BOS each begins with it, and even a last piece of one token is predicted."""
    texts = ["one two three four five six", "seven to"]
    assert [len(tokenizer.encode(text)) for text in texts] == [9, 4]
    path = lines(*({"text": text} for text in texts))
    for bos in ([], [1]):
        named = {"bos_token": "<|user|>"} if bos else {}
        reader = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", **named)
        pieces = []
        for ids in map(tokenizer.encode, texts):
            while ids:
                pieces.append(bos + ids[: 4 - len(bos)])
                ids = ids[4 - len(bos) :]
        found = read_text("t", path, suite(context=4), reader)
        assert found.rows == [(piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]


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
    sampling = {"temperature": 0.5, "top_k": 4, "top_p": 0.8, "max_new_tokens": 9, "batch": 3}
    found = load_suite(path, ["seeds=[3]", *(f"{key}={value}" for key, value in sampling.items())])
    assert (found.seeds, found.sets) == ((3,), {"a": Path("a.jsonl")})
    assert found.sampling.model_dump() == RolloutSettings(alpha=0).model_dump() | sampling


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


# Scores and tables


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


def test_a_sequence_beyond_a_model_s_context_is_refused(lines: Write, models_dir: Path) -> None:
    """256 positions, as its configuration says."""
    path = lines({"prompt": "a word"})
    models = {"m": ModelSettings(path=str(models_dir / "student"))}
    fitting = suite(template="plain", sets={"s": str(path)}, max_new_tokens=200)
    assert subjects(fitting, models)[0].sets.longest(fitting)["s"] < 256
    with pytest.raises(BadInput, match=r"set = 's': sequences may reach 30\d tokens, the context of m has 256; lower"):
        subjects(suite(template="plain", sets={"s": str(path)}, max_new_tokens=300), models)


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


def test_a_student_trained_anew_is_another_though_its_files_are_as_long(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = _weights(tmp_path)
    (tmp_path / "README.md").write_text("Of no account.")
    assert _weights(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert _weights(tmp_path) != before
