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
from safetensors import safe_open
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill.evaluation import measurement, reading
from distill.evaluation.text import rouge_l

pytestmark = pytest.mark.slow

SEEDS, ROWS = (3, 7), 10


@pytest.fixture(scope="module")
def suite(models_dir: Path, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    sets: dict[str, list[dict[str, Any]]] = {
        "prompts": [{"instruction": text, "output": [text, text[::-1]]} for text in corpus[:ROWS]],
        "choices": [
            {"instruction": text, "choices": ["yes", "perhaps not"], "answer": number % 2}
            for number, text in enumerate(corpus[:5])
        ],
        "text": [{"text": text} for text in corpus[:20]],
    }
    for name, records in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content = {
        "teacher": {"path": str(models_dir / "teacher")},
        "sets": {"p": str(folder / "prompts.jsonl")},
        "choices": {"c": str(folder / "choices.jsonl")},
        "texts": {"t": str(folder / "text.jsonl")},
        "template": "chat",
        "seeds": list(SEEDS),
        "compared_seeds": 2,
        "max_new_tokens": 12,
        "context": 16,
        "batch": 4,
        "micro_batch": 4,
        "precision": "fp32",
        "resamples": 200,
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder / "suite.yaml"


def command(suite: Path, models_dir: Path, out: Path) -> list[str]:
    models = ["--model", f"itself={models_dir / 'teacher'}", "--model", f"student={models_dir / 'student'}"]
    return ["--no_local_rank", "--module", "distill", "evaluate", "--suite", str(suite), *models, "--out", str(out)]


@pytest.fixture(scope="module")
def two(launch: Callable, suite: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an evaluation by two ranks, and what it printed."""
    out = tmp_path_factory.mktemp("two") / "out"
    return out, launch(*command(suite, models_dir, out)).stdout


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


def test_every_row_is_answered_in_order(two: tuple[Path, str]) -> None:
    for model in ("teacher", "itself", "student"):
        for seed in SEEDS:
            assert [row["row"] for row in rows(two[0], model, seed)] == list(range(ROWS))
    assert rows(two[0], "student", 3) != rows(two[0], "student", 7)
    assert rows(two[0], "itself", 3) == rows(two[0], "teacher", 3)


def test_the_teacher_is_its_own_equal(two: tuple[Path, str]) -> None:
    itself = evaluation(two[0])["figures"]["itself"]["p"]
    for name, value in (("reverse_kl", 0), ("forward_kl", 0), ("top1_agreement", 1)):
        assert [itself[name][key] for key in ("value", "low", "high")] == pytest.approx([value] * 3, abs=1e-6)
    pairs = evaluation(two[0])["differences"]
    assert [(pair["set"], pair["model"], pair["minus"]) for pair in pairs] == [(s, "student", "itself") for s in "pct"]
    assert pairs[0]["figures"]["reverse_kl"]["low"] > 0.01
    assert pairs[2]["figures"]["perplexity"]["value"] == pytest.approx(
        evaluation(two[0])["figures"]["student"]["t"]["perplexity"]["value"]
        - evaluation(two[0])["figures"]["itself"]["t"]["perplexity"]["value"]
    )


def test_figures_are_those_of_plain_transformers(
    two: tuple[Path, str], models_dir: Path, tokenizer: PreTrainedTokenizerFast, corpus: list[str]
) -> None:
    models = {name: AutoModelForCausalLM.from_pretrained(models_dir / name) for name in ("student", "teacher")}

    def log_probs(name: str, prompt: list[int], ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = models[name](torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return logits.double().log_softmax(-1)

    def prompt(row: int) -> list[int]:
        turns = [{"role": "user", "content": corpus[row]}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]

    found = evaluation(two[0])["figures"]["student"]
    own = [(prompt(row["row"]), row["ids"]) for seed in SEEDS for row in rows(two[0], "student", seed)]
    taught = [(prompt(row["row"]), row["ids"]) for seed in SEEDS for row in rows(two[0], "teacher", seed)]
    kl = {"reverse_kl": 0.0, "forward_kl": 0.0, "teacher_nll": 0.0}
    for start, ids in own:
        log_q, log_p = log_probs("student", start, ids), log_probs("teacher", start, ids)
        kl["reverse_kl"] += float((log_q.exp() * (log_q - log_p)).sum())
        kl["teacher_nll"] -= float(log_p[range(len(ids)), ids].sum())
    for start, ids in taught:
        log_q, log_p = log_probs("student", start, ids), log_probs("teacher", start, ids)
        kl["forward_kl"] += float((log_p.exp() * (log_p - log_q)).sum())
    tokens = {name: sum(len(ids) for _, ids in (taught if name == "forward_kl" else own)) for name in kl}
    for name, total in kl.items():
        assert found["p"][name]["value"] == pytest.approx(total / tokens[name], rel=1e-4)

    texts = [row["text"] for seed in SEEDS for row in rows(two[0], "student", seed)]
    wanted = [rouge_l(text, [corpus[row % ROWS], corpus[row % ROWS][::-1]]) for row, text in enumerate(texts)]
    assert found["p"]["rouge_l"]["value"] == pytest.approx(sum(wanted) / len(wanted))

    nll, count = 0.0, 0
    for text in corpus[:20]:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), 16):
            piece = ids[start : start + 16]
            if len(piece) > 1:
                nll -= float(log_probs("student", piece[:1], piece[1:])[range(len(piece) - 1), piece[1:]].sum())
                count += len(piece) - 1
    assert found["t"]["perplexity"]["value"] == pytest.approx(float(torch.tensor(nll / count).exp()), rel=1e-4)

    right = []
    for number in range(5):
        choices = [tokenizer.encode(text) for text in ("yes", "perhaps not")]
        scores = [float(log_probs("student", prompt(number), ids)[range(len(ids)), ids].sum()) for ids in choices]
        right.append(scores.index(max(scores)) == number % 2)
    assert found["c"]["accuracy"]["value"] == sum(right) / 5


def test_one_rank_and_a_killed_run_say_the_same_as_two(
    two: tuple[Path, str],
    launch: Callable,
    suite: Path,
    models_dir: Path,
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
        *command(suite, models_dir, out),
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
    launch(*command(suite, models_dir, out), ranks=1)
    for path in sorted(two[0].rglob("*.jsonl")):
        assert (out / path.relative_to(two[0])).read_bytes() == path.read_bytes()
    ours, theirs = evaluation(out), evaluation(two[0])
    # The same texts; what is computed of them may round otherwise, for a rank alone has other threads.
    for part in ("figures", "curves"):
        assert flat(ours[part]).keys() == flat(theirs[part]).keys()
        assert flat(ours[part]) == pytest.approx(flat(theirs[part]), rel=1e-6, abs=1e-9, nan_ok=True)
    assert not list(out.rglob("*.rank-*"))

    made = [path for model in ("teacher", "itself", "student") for path in (out / model).iterdir()]
    assert len(made) == 3 * 5
    before = {path: path.stat().st_mtime_ns for path in made}
    again = launch(*command(suite, models_dir, out), ranks=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is measured twice"
    assert "KL(q‖p)" in again.stdout


def test_what_belongs_to_another_model_is_refused(
    two: tuple[Path, str], launch: Callable, suite: Path, models_dir: Path
) -> None:
    words = [*command(suite, models_dir, two[0]), "temperature=0.5"]
    done = launch(*words, ranks=1, check=False)
    assert done.returncode == 2
    assert "holds responses made otherwise (sampling); give another folder, or remove the file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_model_that_gives_no_numbers_is_refused(
    everywhere: bool, launch: Callable, suite: Path, models_dir: Path, corpus: list[str], tmp_path: Path
) -> None:
    """For any text, or for a word of this one."""
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "student")
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


def test_a_model_is_let_go_before_the_next(launch: Callable, suite: Path, models_dir: Path, tmp_path: Path) -> None:
    """Of the teacher and three students the teacher alone is left."""
    words = ["tests/ranks/models_in_turn.py", str(suite), str(models_dir / "student"), str(tmp_path / "out")]
    assert "held: 1\n" in launch(*words, ranks=1).stdout
