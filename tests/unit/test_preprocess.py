"""`make preprocess`: every accepted shape, every refusal, both kinds of tokenizer."""

import copy
import json
import subprocess
from pathlib import Path

import datasets
import pytest
import sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe
from distill.data.loading import InstructionRecords, TextRecords
from distill.data.records import fingerprint, read_manifest
from distill.errors import BadInput


@pytest.fixture
def recipe(models_dir: Path) -> Recipe:
    return Recipe(str(models_dir / "student"), "chat", max_prompt=40, max_length=60)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


SHAPES = [
    {"instruction": "Name a fruit.", "input": "", "output": "An apple."},
    {"instruction": "Shorten.", "input": "A long line.", "output": ["A line.", "Line."]},
    {"prompt": "Name a fruit.", "output": "A pear."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {"instruction": "Name a tree."},
]


def test_every_shape_is_accepted(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", *SHAPES)
    manifest = preprocess([data], tmp_path / "out", recipe, workers=1)
    assert manifest.counts == {"kept": 5, "kept: without a response": 1, "read": 5}
    rows = datasets.load_from_disk(str(tmp_path / "out"))
    assert [len(row["references"]) for row in rows] == [1, 2, 1, 1, 0]
    assert tokenizer.decode(rows[1]["prompt_ids"]) == "<|user|>Shorten.\n\nA long line.<eos><|assistant|>"
    assert tokenizer.decode(rows[1]["response_ids"]) == "A line.<eos>"
    assert rows[4]["response_ids"] == []
    batch = InstructionRecords(tmp_path / "out", "data.train").batch([0, 4])
    assert batch.response_lengths.tolist()[1] == 0


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "Shorten.\n\nA long line.\n\n"),
        ("alpaca", "### Instruction:\nShorten.\n\n### Input:\nA long line.\n\n### Response:\n"),
    ],
)
def test_text_templates(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str, expected: str
) -> None:
    wide = Recipe(recipe.tokenizer, template, 300, 400)
    preprocess([write(tmp_path / "a.jsonl", SHAPES[1])], tmp_path / "out", wide, workers=1)
    text = tokenizer.decode(datasets.load_from_disk(str(tmp_path / "out"))[0]["prompt_ids"])
    assert text.endswith(expected)
    assert ("paired with an input" in text) == (template == "alpaca")


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_a_ready_made_prompt_stays_as_it_is(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str
) -> None:
    wide = Recipe(recipe.tokenizer, template, 300, 400)
    preprocess([write(tmp_path / "a.jsonl", SHAPES[2])], tmp_path / "out", wide, workers=1)
    (row,) = datasets.load_from_disk(str(tmp_path / "out"))
    assert tokenizer.decode(row["prompt_ids"]) == "Name a fruit."


def test_a_prompt_goes_on_where_the_tokenizer_ends_every_text(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ending = copy.deepcopy(tokenizer)
    end = ("<eos>", ending.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[end])
    assert ending.encode("a")[-1] == ending.eos_token_id
    ending.save_pretrained(tmp_path / "tokenizer")
    given = Recipe(str(tmp_path / "tokenizer"), "plain", 300, 400)
    preprocess([write(tmp_path / "a.jsonl", SHAPES[1])], tmp_path / "out", given, workers=1)
    (row,) = datasets.load_from_disk(str(tmp_path / "out"))
    assert tokenizer.decode(row["prompt_ids"]) == "Shorten.\n\nA long line.\n\n"
    assert tokenizer.decode(row["response_ids"]) == "A line.<eos>"


BAD_LINES = [
    ('{"instruction": "a", "output": "b"', "not valid JSON at column"),
    ("[1, 2]", "a JSON object is needed, this is a list"),
    ('{"output": "b"}', "needs 'instruction', 'prompt' or 'messages'"),
    ('{"instruction": "", "output": "b"}', "'instruction' is empty"),
    ('{"instruction": 3, "output": "b"}', "'instruction' must be text, this is a int"),
    ('{"instruction": "a", "output": {"x": 1}}', "'output' must be text or a list of texts"),
    ('{"instruction": "a", "output": ["x", 1]}', "'output' must be text or a list of texts"),
    ('{"messages": []}', "'messages' must be a list of turns"),
    ('{"messages": [{"role": "user"}]}', "each of 'messages' needs a 'role' and a 'content'"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "'messages' has no turn before the response"),
    ('{"instruction": "a", "output": "b", "complete": "no"}', "'complete' must be true or false"),
]


@pytest.mark.parametrize(("line", "wrong"), BAD_LINES)
def test_a_bad_line_is_named_and_leaves_nothing_behind(recipe: Recipe, tmp_path: Path, line: str, wrong: str) -> None:
    data = write(tmp_path / "a.jsonl", SHAPES[0], "", line, SHAPES[0])
    with pytest.raises(BadInput) as caught:
        preprocess([data], tmp_path / "out", recipe, workers=1)
    assert f"{data}:3" in str(caught.value)
    assert wrong in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_answer_beside_a_conversation_wins_and_an_empty_one_is_dropped(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "From the data."}]
    rows = [{"messages": turns, "output": "From the teacher."}, {"instruction": "Go.", "output": " "}]
    manifest = preprocess([write(tmp_path / "a.jsonl", *rows)], tmp_path / "out", recipe, workers=1)
    assert manifest.counts == {"dropped: empty response": 1, "kept": 1, "read": 2}
    (row,) = datasets.load_from_disk(str(tmp_path / "out"))
    assert row["references"] == ["From the teacher."]
    assert tokenizer.decode(row["response_ids"]) == "From the teacher.<eos>"


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "instructions", "settings": null}', '{"kind": 3}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(BadInput, match="damaged; run `make preprocess` again"):
        read_manifest(tmp_path, "data.train")


def test_other_refusals(recipe: Recipe, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    good = write(tmp_path / "a.jsonl", *SHAPES)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes(b'{"instruction": "caf\xe9"}\n')
    turn = {"role": "user", "content": "system"}
    two_users = write(tmp_path / "two.jsonl", {"messages": [turn, turn, turn], "output": "x"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    refusals = [
        ([str(tmp_path / "*.nothing")], "out", recipe, "no such file"),
        ([str(tmp_path / "empty.jsonl")], "out", recipe, "the file is empty"),
        ([str(tmp_path / "latin.jsonl")], "out", recipe, "not UTF-8"),
        ([good], "mine", recipe, "exists and holds no records"),
        ([good], "out", Recipe("/nowhere/tok", "chat", 40, 60), "no such folder"),
        ([good], "out", Recipe(recipe.tokenizer, "chat", 60, 60), "leaves no room"),
        ([good], "out", Recipe(recipe.tokenizer, "chat", 1, 60), "no record was kept"),
        ([two_users], "out", recipe, "the tokenizer's chat template refuses it: turns must alternate"),
    ]
    for data, out, bad, wrong in refusals:
        with pytest.raises(BadInput, match=wrong):
            preprocess(data, tmp_path / out, bad, workers=1)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_tokenizers_do_not_mix(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", *SHAPES)
    preprocess([data], tmp_path / "out", recipe, workers=1)
    preprocess([data], tmp_path / "out", recipe, workers=1)  # the same tokenizer may replace
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|user|>").save_pretrained(
        tmp_path / "tok"
    )
    with pytest.raises(BadInput, match="holds records of another tokenizer"):
        preprocess([data], tmp_path / "out", Recipe(str(tmp_path / "tok"), "plain", 40, 60), workers=1)


def test_plain_text_is_packed_without_loss(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The first line.\n\nThe second line, longer.\n" * 20)
    write(tmp_path / "b.jsonl", {"text": "A document."}, {"text": "Another."})
    data = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    chunks = Recipe(recipe.tokenizer, "alpaca", max_prompt=256, max_length=16)  # text has no prompts to limit
    manifest = preprocess(data, tmp_path / "out", chunks, kind="text", workers=1)
    counts = manifest.counts
    dropped = counts.get("dropped: tokens of the last, incomplete chunk", 0)
    assert counts["kept"] * 16 + dropped == counts["tokens read"]
    rows = datasets.load_from_disk(str(tmp_path / "out"))
    assert {len(row["input_ids"]) for row in rows} == {16}
    batch = TextRecords(tmp_path / "out", "data.plain_text").batch([0, 1])
    assert (batch.prompt_ids.shape, batch.response_ids.shape) == ((2, 1), (2, 15))
    for length in (0, 1):
        empty = Recipe(recipe.tokenizer, "alpaca", max_prompt=256, max_length=length)
        with pytest.raises(BadInput, match="leaves no token to predict"):
            preprocess(data, tmp_path / "out3", empty, kind="text", workers=1)
    write(tmp_path / "c.jsonl", {"txt": "x"})
    with pytest.raises(BadInput, match="needs a 'text' field"):
        preprocess([str(tmp_path / "c.jsonl")], tmp_path / "out2", chunks, kind="text", workers=1)


def test_sentencepiece_tokenizer(corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(corpus))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=500, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    data = write(tmp_path / "a.jsonl", SHAPES[0])
    recipe = Recipe(str(tmp_path / "sp.model"), "plain", 100, 200)
    manifest = preprocess([data], tmp_path / "out", recipe, workers=1)
    (row,) = datasets.load_from_disk(str(tmp_path / "out"))
    assert row["response_ids"] == [*model.encode("An apple."), model.eos_id()]
    assert manifest.tokenizer == read_manifest(tmp_path / "out", "x").tokenizer


def test_fingerprint_tells_tokenizers_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|user|>")
    assert fingerprint(tokenizer) == fingerprint(tokenizer)
    assert fingerprint(tokenizer) != fingerprint(other)


def test_make_target_says_what_is_missing(root: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["make", "preprocess", "DATA=x.jsonl"], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "OUT= is missing" in done.stderr
