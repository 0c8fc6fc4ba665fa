"""Ids beyond a model's rows are refused before it loads: in records, prompts, ends and stop ids.

The tokenizer has 600 tokens, EOS is id 0; a model `short` of them has fewer rows.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from run_configs import change, problems
from tiny_models import tiny_llama, train_tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe
from distill.checks import contents
from distill.config import ModelSettings
from distill.errors import EXIT_BAD_INPUT, BadInput
from distill.evaluation.subjects import subjects
from distill.evaluation.suite import Suite
from distill.models.vocabulary import KnownIds

ROWS = 300
KNOWN = "the tokenizer has the ids 0 to 599"
Short = Callable[..., str]
SFT: dict[str, Any] = {"objective": {"name": "sft"}, "rollout": {}}
KD: dict[str, Any] = {"objective": {"name": "kd"}, "rollout": {}}


@pytest.fixture
def short(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Short:
    """A model with so many rows and the session's tokenizer, `special` tokens added to it; its folder."""

    def make(rows: int = ROWS, **special: str) -> str:
        folder = tmp_path / "short"
        tokenizer.save_pretrained(folder)
        longer = AutoTokenizer.from_pretrained(folder)
        longer.add_special_tokens(special)
        longer.save_pretrained(folder)
        tiny_llama(rows, 1, 0).save_pretrained(folder)
        return str(folder)

    return make


def largest(folder: str, *columns: str) -> int:
    """The largest id of some columns, seen one by one."""
    return max(index for row in load_from_disk(folder) for column in columns for index in row[column])


def records(folder: Path, model: str, response: str) -> str:
    """Three records whose prompts are plain letters; the last one's response is `response`."""
    rows = [{"instruction": "a b c", "output": text} for text in ("a", "b", response)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess([str(folder / "rows.jsonl")], folder / "rows", Recipe(model, "plain", 64, 96), workers=1)
    return str(folder / "rows")


def test_records_beyond_the_teachers_rows(good: dict, short: Short) -> None:
    """The student has them, so under tensor parallelism the run would go on: such a token would count as certain."""
    found = problems(change(good, "teacher.path", short()) | KD)
    told = "the embedding of the teacher has rows for 0 to 299; resize the embedding"
    by_field = {line.split(" = ")[0]: line for line in found}
    assert set(by_field) == {"data.train", "data.valid"}
    for name, columns in (("train", ("prompt_ids", "response_ids")), ("valid", ("prompt_ids",))):
        index = largest(good["data"][name], *columns)
        assert index >= ROWS
        assert f"holds the id {index}, {told}" in by_field[f"data.{name}"]
        assert f"data.{name} = {good['data'][name]!r}: " in by_field[f"data.{name}"]


def test_a_teacher_that_nobody_asks_does_not_count(good: dict, short: Short) -> None:
    assert problems(change(good, "teacher.path", short()) | SFT) == []


def test_what_is_not_read_may_lie_beyond(good: dict, short: Short, models_dir: Path, tmp_path: Path) -> None:
    """MiniLLM reads prompts; KD the responses too, in every row, and not in the first ones alone."""
    train = records(tmp_path, str(models_dir / "student"), "the river")
    assert largest(train, "prompt_ids") < ROWS <= largest(train, "response_ids")
    config = change(change(good, "teacher.path", short()), "data.train", train)
    del config["data"]["valid"]
    assert problems(config) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "_ROWS", 1)
        (line,) = problems(config | KD)
    assert f"response_ids holds the id {largest(train, 'response_ids')}, the embedding of the teacher" in line
    plain = problems(change(config, "data.plain_text", train))
    assert [line.split(" = ")[0] for line in plain] == ["data.plain_text"]


def test_packed_text_beyond_the_rows(good: dict, short: Short, records_dir: Path) -> None:
    text = str(records_dir / "text")
    found = problems(change(change(good, "teacher.path", short()), "data.plain_text", text))
    index = largest(text, "input_ids")
    told = f"data.plain_text = {text!r}: input_ids holds the id {index}, the embedding of the teacher has rows for 0 to"
    assert any(line.startswith(told) for line in found)


def test_an_end_beyond_the_rows(good: dict, short: Short, tmp_path: Path) -> None:
    """As a tokenizer has it to which `<|im_end|>` was added: everything would be trained but the end."""
    student = short(600, eos_token="<|im_end|>")
    train = records(tmp_path, student, "c")
    config = change(change(good, "student.path", student), "data.train", train) | SFT
    del config["data"]["valid"]
    assert problems(config) == [
        f"student.path = {student!r}: its embedding has 600 rows, EOS '<|im_end|>' is id 600; resize the embedding "
        "(transformers: resize_token_embeddings(601)), or set another eos_token",
        f"data.train = {train!r}: response_ids holds the id 600, the embedding of the student has rows for 0 to 599; "
        "resize the embedding (transformers: resize_token_embeddings) and train the new rows, or leave that token out",
    ]


def test_the_padding_token_alone_may_lie_beyond(good: dict, short: Short, tmp_path: Path) -> None:
    """No id is ever written for padding."""
    student = short(600, pad_token="<pad>")
    config = change(change(good, "student.path", student), "data.train", records(tmp_path, student, "c")) | SFT
    del config["data"]["valid"]
    assert problems(config) == []


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_an_end_that_only_a_config_names(where: str, good: dict, short: Short) -> None:
    teacher = short(600)
    if where == "config.json":
        path = Path(teacher) / where
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 600]}))
    else:
        GenerationConfig(eos_token_id=[0, 600]).save_pretrained(teacher)
    assert problems(change(good, "teacher.path", teacher)) == [
        f"teacher.path = {teacher!r}: its config ends responses at the id 600, the tokenizer has the ids 0 to 599; "
        "correct eos_token_id in its config.json and generation_config.json"
    ]


def test_an_end_that_a_config_names_within_the_rows(good: dict, short: Short) -> None:
    teacher = short(600)
    GenerationConfig(eos_token_id=[0, 599]).save_pretrained(teacher)
    assert problems(change(good, "teacher.path", teacher)) == []


def test_the_fewest_rows_are_the_bound(tokenizer: PreTrainedTokenizerFast) -> None:
    """The largest of all ids counts, and the first that has no row."""
    known = KnownIds.of(tokenizer, {"a": 500, "b": 400, "c": 700})
    assert (known.size, known.told) == (400, "the embedding of b has rows for 0 to 399")
    assert [known.beyond(rows) for rows in ([[399, 0], []], [[3], [400]], [[401], [7], [450, 1]], [])] == [
        None,
        400,
        450,
        None,
    ]
    assert KnownIds.of(tokenizer, {"a": 600}) == KnownIds.of(tokenizer, {}) == KnownIds(600, KNOWN)
    with pytest.raises(
        BadInput, match=r"sets.s = 'a.jsonl': holds the id 450, the embedding of b has rows for 0 to 399"
    ):
        known.require([[450]], "sets.s", "a.jsonl")


def test_stop_ids_beyond_the_teachers_rows(good: dict, short: Short) -> None:
    found = problems(change(change(good, "teacher.path", short()), "rollout.stop_ids", [299, 300, 599]))
    wrong = "rollout.stop_ids = [300, 599]: the embedding of the teacher has rows for 0 to 299; give ids of that range"
    assert wrong in found


def test_a_foreign_teacher_has_ids_of_its_own(good: dict, corpus: list[str], tmp_path: Path) -> None:
    """The student's records may hold more ids than it has rows; all tokens of its own tokenizer need one."""
    del good["rollout"]
    foreign = change(good, "teacher.path", str(tmp_path)) | {"objective": {"name": "uld"}}
    theirs = train_tokenizer(corpus, size=380, special=["<end>"])
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.save_pretrained(tmp_path)
    tiny_llama(380, 1, 0).save_pretrained(tmp_path)
    assert theirs.pad_token_id == 380
    assert largest(good["data"]["train"], "response_ids") > 380
    assert problems(foreign) == []
    theirs.add_special_tokens({"eos_token": "<|im_end|>"})
    theirs.save_pretrained(tmp_path)
    (line,) = problems(foreign)
    assert "its embedding has 380 rows, EOS '<|im_end|>' of its tokenizer is id 381; resize the embedding" in line


def suite_of(folder: Path, **sets: Any) -> Suite:
    """One set of each kind, of plain letters but for what `sets` says."""
    rows = {
        "prompts": {"instruction": sets.get("prompts", "a"), "output": "b"},
        "choices": {"instruction": "a", "choices": ["b", sets.get("choices", "c")], "answer": 0},
        "texts": {"text": sets.get("texts", "a b")},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    paths = {name: str(folder / f"{name}.jsonl") for name in rows}
    kinds = {"sets": {"p": paths["prompts"]}, "choices": {"c": paths["choices"]}, "texts": {"t": paths["texts"]}}
    return Suite.model_validate(kinds | {"template": "plain", "max_new_tokens": 8})


@pytest.mark.parametrize(
    ("kind", "field"), [("prompts", "sets.p"), ("choices", "choices.c"), ("texts", "texts.t")], ids=str
)
def test_an_evaluation_refuses_sets_beyond_the_rows(
    kind: str, field: str, short: Short, tokenizer: PreTrainedTokenizerFast, models_dir: Path, tmp_path: Path
) -> None:
    """The second model's: sets are read once for all models of a tokenizer."""
    models = {"whole": ModelSettings(path=str(models_dir / "student")), "short": ModelSettings(path=short())}
    assert [subject.vocabulary.size for subject in subjects(suite_of(tmp_path), models)] == [600, ROWS]
    index = max(tokenizer.encode("the river", add_special_tokens=False))
    assert index >= ROWS
    with pytest.raises(BadInput) as caught:
        subjects(suite_of(tmp_path, **{kind: "the river"}), models)
    told = f"holds the id {index}, the embedding of '{models['short'].path}' has rows for 0 to 299; resize"
    assert str(caught.value).startswith(f"{field} = '{tmp_path}/{kind}.jsonl': {told}")


def test_an_evaluation_refuses_an_end_beyond_the_rows(short: Short, tmp_path: Path) -> None:
    model = short(600, eos_token="<|im_end|>")
    with pytest.raises(BadInput, match=r"model = .*: its embedding has 600 rows, EOS '<\|im_end\|>' is id 600; resize"):
        subjects(suite_of(tmp_path), {"short": ModelSettings(path=model)})


@pytest.mark.slow
def test_a_teacher_is_not_asked_what_it_has_no_row_for(
    short: Short, environment: dict[str, str], tokenizer: PreTrainedTokenizerFast, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "the river"}\n')
    flags = ["--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--template", "plain"]
    command = [sys.executable, "-m", "data_prep.teacher_responses", "--teacher", short(), *flags]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    index = max(tokenizer.encode("the river", add_special_tokens=False))
    assert f"--data = 'a.jsonl': holds the id {index}, the embedding of" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == EXIT_BAD_INPUT
