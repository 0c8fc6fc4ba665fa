"""`distill evaluate` on real ranks: figures against plain transformers, any number of ranks, and after a kill."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from known_answers import learn_by_heart
from plain_evaluation import PlainEvaluation
from safetensors import safe_open
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill.evaluation import measurement, reading

pytestmark = pytest.mark.slow

SEEDS, LIMIT, CONTEXT = (3, 7), 12, 16
# Prompt → what the teacher has learnt to say, the references, and by hand Rouge-L, the best of F = 2 PR / (P + R).
ANSWERS: dict[str, tuple[str, list[str], float]] = {
    "Name a fruit.": ("An apple.", ["a pear", "an apple"], 100),
    "Which animal barks?": ("The dog barks", ["cats", "the dog barked"], 100),  # both verbs have the stem bark
    "Say a colour, please, any one that you like.": ("blue", ["blue sky above"], 50),  # P 1, R 1/3
    "Count.": ("one two three four", ["three", "one three"], 200 / 3),  # P 2/4, R 1
    "Name the day.": ("It is Monday today.", ["today is Monday", "Tuesday"], 400 / 7),  # P 2/4, R 2/3
    "What is water made of?": ("Hydrogen and oxygen", ["hydrogen & oxygen"], 80),  # P 2/3, R 1; no room for EOS
    "Say letters.": ("a b c d e f g", ["G F E D C B A"], 100 / 7),  # of seven words in the other order one
    "Will you?": ("Yes", ["no", " YES! "], 100),
    "Repeat.": ("the the the the the the the", ["the"], 25),  # P 1/7, R 1
    "What is in the box, if there is one?": ("nothing", ["something else"], 0),
}
ROWS, EXACT, CUT = len(ANSWERS), 2, "What is water made of?"
CHOICES = (["yes", "perhaps not"], ["yes", "no", "one of the others"])


@pytest.fixture(scope="module")
def models(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher` has learnt its `ANSWERS` by heart; `student` says anything, and often ends."""
    folder = tmp_path_factory.mktemp("models")
    teacher = tiny_llama(len(tokenizer), 2, seed=1, initializer_range=0.1)
    rows = [(chat(tokenizer, prompt), [*tokenizer.encode(text), 0]) for prompt, (text, *_) in ANSWERS.items()]
    learn_by_heart(teacher, rows, steps=150)
    student = tiny_llama(len(tokenizer), 2, seed=2, tie_word_embeddings=False)
    with torch.no_grad():
        student.lm_head.weight[0] *= 3
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def chat(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    found: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]
    return found


@pytest.fixture(scope="module")
def suite(models: Path, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    sets: dict[str, list[dict[str, Any]]] = {
        "prompts": [{"instruction": prompt, "output": known[1]} for prompt, known in ANSWERS.items()],
        "choices": [
            {"instruction": text, "choices": CHOICES[number % 2], "answer": number % 2}
            for number, text in enumerate(corpus[:8])
        ],
        "text": [{"text": text} for text in corpus[:20]],
    }
    for name, records in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content = {
        "teacher": {"path": str(models / "teacher")},
        "sets": {"p": str(folder / "prompts.jsonl")},
        "choices": {"c": str(folder / "choices.jsonl")},
        "texts": {"t": str(folder / "text.jsonl")},
        "template": "chat",
        "seeds": list(SEEDS),
        "compared_seeds": 2,
        "max_new_tokens": LIMIT,
        "context": CONTEXT,
        "batch": 4,
        "micro_batch": 4,
        "precision": "fp32",
        "resamples": 200,
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder / "suite.yaml"


def command(suite: Path, models: Path, out: Path) -> list[str]:
    named = ["--model", f"itself={models / 'teacher'}", "--model", f"student={models / 'student'}"]
    return ["--no_local_rank", "--module", "distill", "evaluate", "--suite", str(suite), *named, "--out", str(out)]


@pytest.fixture(scope="module")
def two(launch: Callable, suite: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an evaluation by two ranks, and what it printed."""
    out = tmp_path_factory.mktemp("two") / "out"
    return out, launch(*command(suite, models, out)).stdout


def evaluation(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """The numbers in nested dicts and lists, by where they stand."""
    if not isinstance(value, (dict, list)):
        return {at: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: number for key, one in items for place, number in flat(one, f"{at}/{key}").items()}


def rows(out: Path, model: str, seed: int) -> list[dict]:
    lines = (out / model / f"p.seed-{seed}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


@pytest.fixture(scope="module")
def plain(two: tuple[Path, str], models: Path, tokenizer: PreTrainedTokenizerFast) -> PlainEvaluation:
    loaded = {name: AutoModelForCausalLM.from_pretrained(models / name) for name in ("teacher", "student")}
    answers = {
        model: [[row["ids"] for row in rows(two[0], model, seed)] for seed in SEEDS]
        for model in ("teacher", "itself", "student")
    }
    prompts = [chat(tokenizer, prompt) for prompt in ANSWERS]
    references = [known[1] for known in ANSWERS.values()]
    return PlainEvaluation(tokenizer, loaded | {"itself": loaded["teacher"]}, prompts, references, answers)


def test_the_teacher_says_what_it_has_learnt_in_the_sets_order(
    two: tuple[Path, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its figures are known by hand: answers that end are equal to their references, and one is cut."""
    for model in ("teacher", "itself"):
        for seed in SEEDS:
            expected = []
            for place, (prompt, (text, *_)) in enumerate(ANSWERS.items()):
                ids = [*tokenizer.encode(text), 0][:LIMIT]
                expected.append({"row": place, "text": text, "ids": ids, "ended": prompt != CUT})
            assert rows(two[0], model, seed) == expected
        found = evaluation(two[0])["figures"][model]["p"]
        assert found["rouge_l"]["value"] == pytest.approx(sum(known[2] for known in ANSWERS.values()) / ROWS)
        assert found["exact_match"]["value"] == pytest.approx(100 * EXACT / ROWS)
        assert found["ended"]["value"] == pytest.approx(1 - 1 / ROWS)
        # t, he, six times the, EOS: of six 4-grams the, the, the, the stands there three times.
        assert found["repetition"]["value"] == pytest.approx(2 / 6 / ROWS)
    itself = evaluation(two[0])["figures"]["itself"]["p"]
    for name, value in (("reverse_kl", 0), ("forward_kl", 0), ("top1_agreement", 1)):
        assert [itself[name][key] for key in ("value", "low", "high")] == pytest.approx([value] * 3, abs=1e-6)


def test_figures_are_those_of_plain_transformers(
    two: tuple[Path, str], plain: PlainEvaluation, tokenizer: PreTrainedTokenizerFast, corpus: list[str]
) -> None:
    responses = [row for seed in SEEDS for row in rows(two[0], "student", seed)]
    assert [row["row"] for row in responses] == [*range(ROWS)] * 2
    assert responses[0]["ids"] != responses[ROWS]["ids"], "each seed has draws of its own"
    assert {len(row["ids"]) for row in responses} > {2, LIMIT}
    for row in responses:
        assert row["text"] == tokenizer.decode([token for token in row["ids"] if token > 2])
        assert row["ended"] == (row["ids"][-1] == 0)
        assert 0 not in row["ids"][:-1]

    content = evaluation(two[0])
    questions = [
        (chat(tokenizer, text), [tokenizer.encode(choice) for choice in CHOICES[number % 2]], number % 2)
        for number, text in enumerate(corpus[:8])
    ]
    texts = [tokenizer.encode(text) for text in corpus[:20]]
    expected = {
        model: {
            "p": plain.of_answers(model) | {"exact_match": 100 * EXACT / ROWS * (model == "itself")},
            "c": plain.of_choices(model, questions),
            "t": {"perplexity": plain.perplexity(model, texts, CONTEXT)},
        }
        for model in ("itself", "student")
    }
    for model, sets in expected.items():
        for name, figures in sets.items():
            assert values(content["figures"][model][name]) == pytest.approx(figures, rel=1e-4, abs=1e-6)
    curves = flat(plain.of_positions("student"))
    assert flat(content["curves"]["student"]["p"]) == pytest.approx(curves, rel=1e-4, abs=1e-5)

    pairs = content["differences"]
    assert [(one["set"], one["model"], one["minus"]) for one in pairs] == [(s, "student", "itself") for s in "pct"]
    for one in pairs:
        later, earlier = (expected[model][one["set"]] for model in ("student", "itself"))
        difference = {key: later[key] - earlier[key] for key in later if not key.startswith("dist_")}
        assert values(one["figures"]) == pytest.approx(difference, rel=1e-4, abs=1e-6)


def values(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: one["value"] for name, one in figures.items()}


def test_one_rank_and_a_killed_run_say_the_same_as_two(
    two: tuple[Path, str],
    launch: Callable,
    suite: Path,
    models: Path,
    environment: dict[str, str],
    free_port: Callable[[], int],
    root: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    words = [
        "deepspeed",
        "--num_accelerators",
        "1",
        "--master_port",
        str(free_port()),
        *command(suite, models, out),
    ]
    run = subprocess.Popen(words, cwd=root, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    part = out / "teacher/p.seed-7.jsonl"
    deadline = time.monotonic() + 120
    while not part.parent.exists() or not list(part.parent.glob("p.seed-7*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (out / "evaluation.json").exists()
    launch(*command(suite, models, out), ranks=1)
    for path in sorted(two[0].rglob("*.jsonl")):
        assert (out / path.relative_to(two[0])).read_bytes() == path.read_bytes()
    ours, theirs = evaluation(out), evaluation(two[0])
    # The same texts; what is computed of them may round otherwise, for a rank alone has other threads.
    for part, error in (("figures", 1e-9), ("curves", 1e-5)):  # the latter in percent, of a difference that may be 0
        assert flat(ours[part]).keys() == flat(theirs[part]).keys()
        assert flat(ours[part]) == pytest.approx(flat(theirs[part]), rel=1e-6, abs=error, nan_ok=True)
    assert not list(out.rglob("*.rank-*"))

    made = [path for model in ("teacher", "itself", "student") for path in (out / model).iterdir()]
    assert len(made) == 3 * 5
    before = {path: path.stat().st_mtime_ns for path in made}
    again = launch(*command(suite, models, out), ranks=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is measured twice"
    assert "KL(q‖p)" in again.stdout


def test_what_belongs_to_another_model_is_refused(
    two: tuple[Path, str], launch: Callable, suite: Path, models: Path
) -> None:
    words = [*command(suite, models, two[0]), "temperature=0.5"]
    done = launch(*words, ranks=1, check=False)
    assert done.returncode == 2
    assert "holds responses made otherwise (sampling); give another folder, or remove the file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_model_that_gives_no_numbers_is_refused(
    everywhere: bool, launch: Callable, suite: Path, models: Path, corpus: list[str], tmp_path: Path
) -> None:
    """For any text, or for a word of this one."""
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    tokenizer.save_pretrained(tmp_path / "broken")
    model = tiny_llama(len(tokenizer), 2, seed=1, tie_word_embeddings=False)
    word = tokenizer.encode(corpus[0])[5]
    with torch.no_grad():
        (model.model.norm.weight if everywhere else model.model.embed_tokens.weight[word])[0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    words = [*command(suite, tmp_path, tmp_path / "out"), "teacher=null", "sets={}", "choices={}"]
    at = words.index("--model")
    words[at : at + 4] = ["--model", str(tmp_path / "broken")]
    done = launch(*words, ranks=1, check=False)
    assert done.returncode == 2
    what = "its logits are not numbers" if everywhere else "its nll is not a number"
    assert f"{what}; look for NaN in the weights" in " ".join(done.stderr.split())
    assert not list((tmp_path / "out").rglob("*.safetensors")), "no scores are kept"


def test_scores_know_what_they_were_made_of(two: tuple[Path, str]) -> None:
    """A figure defined anew, or one more, is measured again: both stand in the file, all of which must be as asked."""
    for name, measures in (("p", reading.TO_TEACHER), ("c", reading.ALONE), ("t", reading.ALONE)):
        with safe_open(two[0] / f"student/{name}.scores.safetensors", "numpy") as file:
            origin = json.loads(file.metadata()["origin"])
        assert origin["measures"] == list(measures)
        assert origin["form"] == measurement._FORM


def test_a_model_is_let_go_before_the_next(launch: Callable, suite: Path, models: Path, tmp_path: Path) -> None:
    """Of the teacher and three students the teacher alone is left."""
    words = ["tests/ranks/models_in_turn.py", str(suite), str(models / "student"), str(tmp_path / "out")]
    assert "held: 1\n" in launch(*words, ranks=1).stdout
