"""A run that overfits, on real ZeRO-3 ranks: it ends by itself, keeps the best student by the metric that was asked
for, and stays ended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe
from distill.checkpoint.catalog import newest
from distill.config import Config
from distill.data.loading import InstructionRecords
from distill.doctor import examine

pytestmark = pytest.mark.slow

RANKS = 2
STEPS, EVERY, PATIENCE = 120, 3, 3
TIMINGS = ("time/", "memory/", "tokens/per_second")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory, models_dir: Path, corpus: list[str]) -> Path:
    """Records of a kind that the training records, learnt by heart, say ever less of."""
    folder = tmp_path_factory.mktemp("valid")
    lines = [json.dumps({"instruction": text, "output": " ".join(text.split()[-6:])}) for text in corpus[64:80]]
    (folder / "valid.jsonl").write_text("\n".join(lines) + "\n")
    recipe = Recipe(str(models_dir / "student"), "chat", max_prompt=64, max_length=96)
    preprocess([str(folder / "valid.jsonl")], folder / "records", recipe, workers=1)
    return folder / "records"


@pytest.fixture(scope="module")
def write(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, records_dir: Path, valid: Path, root: Path
) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("stopped")

    def to(name: str, run: str, patience: int) -> Path:
        config: dict[str, Any] = {
            "run": {"folder": str(folder / run), "seed": 2},
            "student": {"path": str(models_dir / "student")},
            "data": {"train": str(records_dir / "train"), "valid": str(valid)},
            "objective": {"name": "sft"},
            "precision": "fp32",
            "optim": {"lr": 2e-2, "batch_size": 16, "micro_batch": 4, "steps": STEPS},
            "parallel": {"deepspeed": str(root / "ds_configs/zero3.json")},
            "evaluation": {"every": EVERY, "prompts": 16, "metric": "loss", "patience": patience},
            "checkpoint": {"every": 1, "keep": 99},
            "log": {"wandb": "disabled"},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return to


def rows(run: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMINGS)} for row in found]


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["valid/loss"] for row in rows(run) if "valid/loss" in row}


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(write: Callable[..., Path], launch: Callable) -> tuple[Path, str]:
    """The run's folder after its first start, and what that said."""
    path = write("run", "run", PATIENCE)
    done = launch("launch/train.sh", "--config", str(path), ranks=RANKS)
    return path.parent / "run", done.stdout + done.stderr


def test_it_ends_when_patience_does_and_says_why(stopped: tuple[Path, str]) -> None:
    run, said = stopped
    found = losses(run)
    best = min(found, key=lambda step: found[step])
    last = best + PATIENCE * EVERY
    assert EVERY < best < last < STEPS, "the loss has fallen, then risen"
    assert list(found) == list(range(EVERY, last + 1, EVERY))
    why = f"valid/loss has not improved in 3 validations since it was {found[best]:.4g} (evaluation.patience)"
    assert rows(run)[-1] == {"step": last, "ended": why}
    assert f"{last} steps in" in said
    assert f"ended early: {why}" in said


def test_the_best_student_is_kept(stopped: tuple[Path, str], valid: Path) -> None:
    """Its loss on the validation records, with transformers alone, is the least of all."""
    run, _ = stopped
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    records = InstructionRecords(valid, "data.valid")
    batch = records.batch(list(range(len(records))))
    inputs = batch.model_inputs()
    with torch.no_grad():
        logprobs = student(**inputs).logits.log_softmax(-1)
    width = batch.prompt_ids.shape[1]
    picked = logprobs[:, width - 1 : -1].gather(-1, batch.response_ids[..., None])[..., 0]
    loss = -picked[batch.response_mask].mean()
    assert float(loss) == pytest.approx(min(losses(run).values()), rel=1e-4)


def test_an_ended_run_stays_ended(stopped: tuple[Path, str], write: Callable[..., Path], launch: Callable) -> None:
    run, _ = stopped
    before = contents(run)
    done = launch("launch/train.sh", "--config", str(write("again", "run", PATIENCE)), ranks=RANKS)
    assert "ended early: valid/loss has not improved" in done.stdout + done.stderr
    after = contents(run)
    assert {name: after[name] for name in before if name != ".lock"} == {
        name: before[name] for name in before if name != ".lock"
    }
    assert after.keys() == before.keys()


def test_patience_survives_a_kill(
    stopped: tuple[Path, str], write: Callable[..., Path], launch: Callable, tmp_path: Path
) -> None:
    """Taken up between two validations, after one that was no improvement, it ends as it did; then with more patience
    it goes on where it had ended."""
    run, _ = stopped
    last = max(losses(run))
    path, kept = write("taken up", "run", PATIENCE), run.parent / "whole"
    jobs: list[dict[str, str]] = [
        {"rewind": str(run), "to": f"step-{last - 2 * EVERY + 1:07d}", "kept": str(kept)},
        {"config": str(path)},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    launch("tests/ranks/train_many.py", str(tmp_path / "jobs.json"), ranks=RANKS)
    assert rows(run) == rows(kept)
    (ours, _), (theirs, _) = newest(run), newest(kept)
    assert ours is not None
    assert theirs is not None
    assert ours.state.memory == theirs.state.memory
    assert ours.state.memory["selection"]["failed"] == PATIENCE
    assert (ours.tag, ours.state.best, ours.state.best_step) == (theirs.tag, theirs.state.best, theirs.state.best_step)
    weights = [load_file(folder / "student/model.safetensors") for folder in (run, kept)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())

    launch("launch/train.sh", "--config", str(write("patient", "run", PATIENCE + 1)), ranks=RANKS)
    found = losses(run)
    assert max(found) >= last + EVERY
    whole = [row for row in rows(kept) if "ended" not in row]
    assert rows(run)[: len(whole)] == whole


# Objective, settings of the validation, and what it must find beside its metric.
METRICS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "samples of a student without a teacher": ("sft", {"metric": "rouge_l"}, {"mean_length", "ended", "repetition"}),
    "two samples a prompt": ("sft", {"metric": "rouge_l", "seeds": 2}, {"mean_length", "ended", "repetition"}),
    "loss beside samples": ("minillm", {"metric": "loss"}, {"rouge_l", "reverse_kl", "ended"}),
    "divergence": ("minillm", {"metric": "reverse_kl"}, {"rouge_l", "ended"}),
}
PROMPTS = 6


@pytest.fixture(scope="module")
def chosen(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, records_dir: Path, root: Path, launch: Callable
) -> Path:
    """The folder of a run of each kind, made by one start of the ranks."""
    folder = tmp_path_factory.mktemp("chosen")
    jobs = []
    for name, (objective, evaluation, _) in METRICS.items():
        rollout = {"per_round": 16, "inner_epochs": 1} if objective == "minillm" else {}
        config: dict[str, Any] = {
            "run": {"folder": str(folder / name), "seed": 2},
            "student": {"path": str(models_dir / "student")},
            "teacher": {"path": str(models_dir / "teacher")},
            "data": {"train": str(records_dir / "train"), "valid": str(records_dir / "valid")},
            "objective": {"name": objective},
            "precision": "fp32",
            "rollout": {"max_new_tokens": 8, **rollout},
            "optim": {"lr": 5e-3, "batch_size": 16, "micro_batch": 8, "steps": 3},
            "parallel": {"deepspeed": str(root / "ds_configs/zero3.json")},
            "evaluation": {"every": 1, "prompts": PROMPTS, **evaluation},
            "log": {"wandb": "disabled"},
        }
        assert not examine(Config.model_validate(config), RANKS).problems
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        jobs.append({"config": str(folder / f"{name}.yaml")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch("tests/ranks/train_many.py", str(folder / "jobs.json"), ranks=RANKS)
    return folder


@pytest.mark.parametrize("name", METRICS)
def test_the_metric_that_was_asked_for_chooses(name: str, chosen: Path) -> None:
    _, evaluation, beside = METRICS[name]
    metric = evaluation["metric"]
    found = [row for row in rows(chosen / name) if f"valid/{metric}" in row]
    assert [row["step"] for row in found] == [1, 2, 3]
    assert {f"valid/{figure}" for figure in beside} <= found[0].keys()
    best = (max if metric == "rouge_l" else min)(row[f"valid/{metric}"] for row in found)
    checkpoint, _ = newest(chosen / name)
    assert checkpoint is not None
    assert checkpoint.state.best == (best if metric == "rouge_l" else -best)
    assert checkpoint.state.best_step == next(row["step"] for row in found if row[f"valid/{metric}"] == best)
    assert f"| optimizer steps | {checkpoint.state.best_step} |" in (chosen / name / "student/README.md").read_text()


def test_more_samples_are_other_samples_of_the_same_student(chosen: Path) -> None:
    one, two = (rows(chosen / name)[1::2] for name in list(METRICS)[:2])
    for alone, both in zip(one, two, strict=True):
        # What the second response to each prompt has; lengths are whole numbers.
        second = 2 * both["valid/mean_length"] - alone["valid/mean_length"]
        assert second * PROMPTS == pytest.approx(round(second * PROMPTS), abs=1e-6)
        assert 1 <= second <= 8
    assert [row["valid/mean_length"] for row in one] != [row["valid/mean_length"] for row in two]
