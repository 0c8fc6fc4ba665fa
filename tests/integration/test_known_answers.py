"""The teacher's answers and validation's figures on real ranks, against answers that are known beforehand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from known_answers import ALPACA, ALPACA_WITH_INPUT, greedy, learn_by_heart, log_probs
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe

pytestmark = pytest.mark.slow

LIMIT = 8
EOS, USER = 0, 1
"""The tokenizer's EOS, and another special token that the teacher's generation config names as an end."""


class Known(NamedTuple):
    """A prompt, and what a model has learnt to say to it."""

    record: dict[str, Any]
    text: str
    end: int = EOS
    complete: bool = True
    """It fits `LIMIT` tokens."""

    def prompt_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        instruction, extra = self.record["instruction"], self.record.get("input")
        text = ALPACA_WITH_INPUT.format(instruction, extra) if extra else ALPACA.format(instruction)
        return tokenizer.encode(text)

    def response_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        return [*tokenizer.encode(self.text), self.end]


FILES = {
    "p": [
        Known({"id": "1", "instruction": "Name a fruit.", "output": "A person's, to be replaced."}, "An apple."),
        Known({"id": "2", "instruction": "Count."}, "one two three four five six seven", complete=False),
        # Its end is the last token that may be written; that of the answer to "Which animal barks?" would be one more.
        Known({"id": "3", "instruction": "Say letters, please, as many as you like."}, "a b c d e f g"),
        Known({"id": "4", "instruction": "Whose turn?"}, "yours", end=USER),
        Known(
            {"id": "5", "instruction": "Which animal barks?", "input": "Cats, dogs."}, "The dog barks", complete=False
        ),
    ],
    "q": [
        Known({"id": "6", "instruction": "What is water made of?"}, "Hydrogen and oxygen", complete=False),
        Known({"id": "7", "instruction": "Say a colour, any one of those that you know."}, "blue"),
        Known({"id": "8", "instruction": "Name a day."}, "day"),
        Known({"id": "9", "instruction": "Greet me."}, "Hello, and welcome to this place", complete=False),
    ],
}
COIN = {"instruction": "Toss a coin."}
SIDES = ("Heads.", "tails it is")
FILES["q"] += [Known(COIN, SIDES[0])] * 5


@pytest.fixture(scope="module")
def teacher(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the answer to each prompt of `FILES`, and to `COIN` another one, for one case in three."""
    learnt = [one for known in FILES.values() for one in known if one.record != COIN]
    learnt += [Known(COIN, SIDES[0]), Known(COIN, SIDES[0]), Known(COIN, SIDES[1])]
    model = tiny_llama(len(tokenizer), 2, seed=1, initializer_range=0.1)
    learn_by_heart(model, [(one.prompt_ids(tokenizer), one.response_ids(tokenizer)) for one in learnt])
    model.generation_config = GenerationConfig(eos_token_id=[EOS, USER])
    folder = tmp_path_factory.mktemp("knows") / "teacher"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_teacher_writes_what_plain_transformers_write(
    teacher: Path, tokenizer: PreTrainedTokenizerFast, launch: Callable, tmp_path: Path
) -> None:
    """Greedy answers of two files over two ranks, and sampled ones of a third."""
    given = {name: [one.record for one in known] for name, known in FILES.items()} | {"coins": [COIN] * 10}
    files = {name: str(write_lines(tmp_path / f"{name}.jsonl", records)) for name, records in given.items()}
    words = ["--teacher", str(teacher), "--out", str(tmp_path / "out"), "--max-new-tokens", str(LIMIT), "--batch", "2"]
    words += ["--data", files["coins"], "--greedy-data", files["q"], files["p"]]
    launch("--no_local_rank", "--module", "data_prep.teacher_responses", *words)
    lines = {name: (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in given}
    written = {name: [json.loads(line) for line in of_file] for name, of_file in lines.items()}

    model = AutoModelForCausalLM.from_pretrained(teacher)
    for name, known in FILES.items():
        expected = []
        for one in known:
            ids = greedy(model, one.prompt_ids(tokenizer), LIMIT, [EOS, USER])
            assert ids == one.response_ids(tokenizer)[:LIMIT], "what the model has learnt"
            text = tokenizer.decode(ids[:-1] if one.complete else ids)
            expected.append(one.record | {"output": text, "complete": one.complete, "written_by": str(teacher)})
        assert written[name] == expected
    assert written["p"][4]["output"] == "The dog barks"

    tossed = [one["output"] for one in written["coins"]]
    assert set(tossed) == set(SIDES)
    assert all(one["complete"] for one in written["coins"])
    assert tossed[::2] != tossed[1::2], "each rank has draws of its own"


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Prompt → what the student has learnt to say, and the references.
KNOWN: dict[str, tuple[str, list[str]]] = {
    "Name a fruit.": ("An apple.", ["An apple."]),
    "Say a colour, any one of those that you know.": ("blue", ["blue sky above"]),
    "Count.": ("one two three four", ["three", "one three"]),
    "Which animal?": ("The dog barks", ["Cats", "a dog barked", "dogs"]),
    "Repeat.": ("the the the the the the the the", ["the"]),
}
# Rouge-L is the best of F = 2 PR / (P + R): P 1, R 1/3; P 2/4, R 1; P 2/3, R 2/3 (bark is the stem); P 1/7, R 1.
ROUGE_L = 100 + 50 + 200 / 3 + 200 / 3 + 25
# Tokens, with EOS where there is room for one: three of the five end.
LENGTHS, ENDED = 7 + 5 + 5 + LIMIT + LIMIT, 3
# t, he and six times the: five 4-grams, of which the last stands there three times.
REPETITION = 2 / 5
TOSSES = ("Toss a coin.", "Toss another one, please.", "Once more.", "And the last.")
"""Of the two answers the first is the reference, the other has no word of it; both have five tokens and EOS."""


@pytest.fixture(scope="module")
def validated(
    teacher: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run whose student has learnt `KNOWN` by heart, and two answers to each of `TOSSES`; it has dropout."""
    folder = tmp_path_factory.mktemp("validated")
    learnt = [(prompt, text) for prompt, (text, _) in KNOWN.items()] + [(toss, s) for toss in TOSSES for s in SIDES]
    student = tiny_llama(len(tokenizer), 2, seed=3, initializer_range=0.1, attention_dropout=0.2)
    learn_by_heart(student, [(tokenizer.encode(ALPACA.format(p)), [*tokenizer.encode(s), EOS]) for p, s in learnt])
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    records = [{"instruction": prompt, "output": references} for prompt, (_, references) in KNOWN.items()]
    records += [{"instruction": prompt, "output": SIDES[0]} for prompt in (*TOSSES, "Not asked.")]
    write_lines(folder / "valid.jsonl", records)
    recipe = Recipe(str(folder / "student"), "alpaca", max_prompt=100, max_length=140)
    preprocess([str(folder / "valid.jsonl")], folder / "valid", recipe, workers=1)
    return {
        "run": {"folder": str(folder / "run")},
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(teacher)},
        "data": {"train": str(folder / "valid"), "valid": str(folder / "valid")},
        "objective": {"name": "minillm"},
        "precision": "fp32",
        "optim": {"steps": 1, "batch_size": 2, "micro_batch": 2},
        # Of this the limit alone is validation's: it samples from the student as it is.
        "rollout": {"alpha": 0.5, "temperature": 3.0, "top_k": 1, "top_p": 0.1, "max_new_tokens": LIMIT}
        | {"batch": 2, "per_round": 2, "gather": "layer", "teacher_cache": "host"},
        "evaluation": {"prompts": len(KNOWN) + len(TOSSES), "seeds": 2, "metric": "loss"},
    }


def test_validation_reports_what_the_student_is_known_to_say(
    validated: dict[str, Any], tokenizer: PreTrainedTokenizerFast, launch: Callable, tmp_path: Path
) -> None:
    """Nine prompts over two ranks, of which one reads a prompt twice; two rounds; two validations."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(validated))
    launch("tests/ranks/validation_figures.py", str(tmp_path / "run.yaml"), str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    rounds = [dict(map(tuple, first + second)) for first, second in zip(*found["rounds"], strict=True)]
    assert [len(part) for rank in found["rounds"] for part in rank] == [5] * 8
    assert rounds[0] != rounds[1], "each round has draws of its own"
    assert rounds[2:] == rounds[:2], "two validations differ by the student alone"

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(validated[name]["path"]) for name in ("student", "teacher")
    )
    prompts = [tokenizer.encode(ALPACA.format(prompt)) for prompt in (*KNOWN, *TOSSES)]
    expected = dict.fromkeys(("rouge_l", "mean_length", "repetition", "ended", "reverse_kl"), 0.0)
    for answers in rounds[:2]:
        texts = [tokenizer.decode([token for token in answers[row] if token != EOS]) for row in range(len(prompts))]
        assert texts[: len(KNOWN) - 1] == [text for text, _ in KNOWN.values()][:-1]
        assert set(texts[len(KNOWN) :]) == set(SIDES)
        kl, tokens = 0.0, 0
        for row, prompt in enumerate(prompts):
            log_q, log_p = (log_probs(model, prompt, answers[row]) for model in (student, teacher))
            kl += float((log_q.exp() * (log_q - log_p)).sum())
            tokens += len(answers[row])
        heads = texts.count(SIDES[0])
        of_round = {
            "rouge_l": (ROUGE_L + 100 * heads) / 9,
            "mean_length": (LENGTHS + 6 * len(TOSSES)) / 9,
            "repetition": REPETITION / 9,
            "ended": (ENDED + len(TOSSES)) / 9,
            "reverse_kl": kl / tokens,
        }
        expected = {name: value + of_round[name] / 2 for name, value in expected.items()}

    nll, tokens = 0.0, 0
    references = [references[0] for _, references in KNOWN.values()] + [SIDES[0]] * len(TOSSES)
    for prompt, reference in zip(prompts, references, strict=True):
        ids = [*tokenizer.encode(reference), EOS]
        nll -= float(log_probs(student, prompt, ids)[range(len(ids)), ids].sum())
        tokens += len(ids)
    assert found["loss"] == pytest.approx(nll / tokens, rel=1e-5), "without dropout"
    for figures in found["figures"]:
        assert figures == pytest.approx(expected | {"loss": nll / tokens}, rel=1e-5)
