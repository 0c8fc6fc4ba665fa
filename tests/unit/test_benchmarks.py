"""The measuring tools: their arithmetic by hand, and every promised key in a run on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

from data_prep.tokenize import Recipe
from tools.benchmarks.floor import mixed_rollout_floor, parameters
from tools.benchmarks.meter import Meter
from tools.benchmarks.preprocess import Prose, Share, _texts_of, speeds, train_tokenizer, write_corpus
from tools.benchmarks.timing import interleaved, ratio, spread


def test_ratios_are_taken_within_a_round() -> None:
    times = {"a": [1.0, 4.0, 3.0], "b": [2.0, 4.0, 1.0]}
    assert ratio(times, "a", "b") == {"a_over_b": 1.0, "a_over_b_spread": 0.625}
    assert spread([7.0]) == 0


def test_variants_take_turns_and_warm_up() -> None:
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "xy"}, 2)
    assert order == ["x", "y"] * 3
    assert [len(took) for took in times.values()] == [2, 2]


@pytest.mark.parametrize(("dtype", "item"), [(torch.bfloat16, 2), (torch.float32, 4)], ids=str)
def test_floor_of_a_rollout_by_hand(dtype: torch.dtype, item: int) -> None:
    student, teacher = tiny_llama(10, 1, 1).to(dtype), tiny_llama(10, 2, 2).to(dtype)
    # One layer: q and o 32·32, k and v 32·16, three of 32·64; the head 10·32.
    layer, head = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64, 10 * 32
    assert parameters(student) == (layer, head)
    assert parameters(teacher) == (2 * layer, head)
    # 3 rows, prompts of 7 tokens in all, 5 new tokens, 4 calls of the student and 2 of the teacher.
    by_arithmetic = 2 * ((7 + 4 * 3) * layer + 5 * 3 * head + (7 + 3 * 4) * 2 * layer + 15 * head)
    assert mixed_rollout_floor(student, teacher, 3, 7, 5, (4, 2), (1.0, 1e12)) == pytest.approx(by_arithmetic)
    by_memory = item * (4 * layer + 4 * head + 2 * 2 * layer + head)
    assert mixed_rollout_floor(student, teacher, 3, 7, 5, (4, 2), (1e12, 1.0)) == pytest.approx(by_memory)


def test_preprocessing_is_compared_on_the_texts_that_it_tokenises(tmp_path: Path) -> None:
    lines = [Prose(7).line("instructions") for _ in range(2)]
    assert lines[0] == lines[1]
    prose = Prose(7)
    write_corpus(tmp_path / "a.jsonl", 20_000, lambda: prose.line("instructions"))
    write_corpus(tmp_path / "a.txt", 20_000, lambda: prose.line("text"))
    train_tokenizer(tmp_path / "tokenizer", tmp_path / "a.txt")
    recipe = Recipe(str(tmp_path / "tokenizer"), "plain", 256, 512)
    figures = speeds(tmp_path / "a.jsonl", recipe, "instructions", 1, 2)
    assert figures["preprocess_over_tokenizer_instructions"] > 0
    assert figures["tokens_per_s_per_core_instructions"] > 0
    _, texts = _texts_of(Share(tmp_path / "a.jsonl", recipe, "instructions", 0, 1))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert texts == [row["instruction"] + "\n\n" for row in rows] + [row["output"] for row in rows]


KEYS = {
    "rollout": (
        *("teacher_passes", "student_passes", "mixed_over_naive", "mixed_over_generate", "student_over_generate"),
        *("short_over_full", "tokens_per_s_mixed", "floor_fraction", "mixed_over_naive_spread"),
    ),
    "step": ("step_over_plain", "share_rollout", "share_forward", "share_backward", "share_optimizer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", KEYS)
def test_a_run_writes_every_key(
    what: str, models_dir: Path, tmp_path: Path, root: Path, environment: dict[str, str]
) -> None:
    models = ["--teacher", str(models_dir / "teacher"), "--student", str(models_dir / "student")]
    sizes = ["--rows", "4", "--prompt", "6", "--new-tokens", "16", "--repeats", "1", "--json", str(tmp_path / "f.json")]
    more = ["--one-process"] if what == "rollout" else []
    command = [sys.executable, "-m", "tools.benchmark", what, *models, *sizes, *more]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=300)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert all(isinstance(figures[key], float) for key in KEYS[what])
    # What this machine computes fast in: bf16 elsewhere would take a hundred times as long.
    features = torch.cpu.get_capabilities()
    assert figures["precision"] == ("bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32")
    if what == "rollout":
        assert (figures["teacher_passes"], figures["student_passes"]) == (1.0, 1.0)


@pytest.mark.slow
def test_the_plan_agrees_with_ranks(tmp_path: Path, root: Path, environment: dict[str, str]) -> None:
    sizes = ["--layouts", "2x1", "--prompt", "8", "--layers", "1", "rollout.max_new_tokens=8", "optim.micro_batch=4"]
    command = [sys.executable, "-m", "tools.benchmark", "scale", *sizes, "--json", str(tmp_path / "f.json")]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=300)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["plan_memory_error_max"] < 0.15
    assert figures["bytes_over_theory_max"] == pytest.approx(1, abs=0.05)
    (row,) = figures["layouts"]
    assert (row["ranks"], row["tp"]) == (2, 1)
    assert row["state_bytes"] == pytest.approx(row["plan_state_bytes"], rel=0.01)


def test_meter_sees_what_lives_and_what_has_lived() -> None:
    with Meter() as meter:
        kept = torch.zeros(1000)
        view = kept[:10]
        gone = kept + 1
        del gone
        kept.add_(1)
        assert (meter.live, meter.peak) == (4000, 8000)
        meter.restart()
        assert meter.peak == 4000
        del kept
        assert meter.live == 4000, "its storage lives on in the view"
        del view
        assert meter.live == 0
