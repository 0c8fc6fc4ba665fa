"""A number that is not finite, on one of two real ranks: the step changes nothing on either, is counted and kept."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ledger import Ledger
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from distill.bad_numbers import GRADIENT, LOSS, REWARD, TEACHER
from distill.errors import EXIT_BAD_NUMBERS

pytestmark = pytest.mark.slow

NAMES = {"loss": LOSS, "reward": REWARD, "teacher": TEACHER, "gradient": GRADIENT}
# A sound step after each: what a bad one left behind would show in it.
BAD = {"1": "loss", "3": "reward", "5": "teacher", "7": "gradient"}
STEPS = 9
TP = ["parallel.student_tp=2", "parallel.teacher_tp=2", "optim.micro_batch=4"]
SFT = "objective={name: sft}"
ZERO2 = "parallel.deepspeed=ds_configs/zero2.json"
TOO_MANY = [ZERO2, "fault.max_bad_steps=1", "checkpoint.every=2"]
TAID = "objective={name: taid, step_size: 0.5}"

# Name → overrides, steps, which of them go bad.
MIXED: dict[str, tuple[list[str], int, dict[str, str]]] = {
    # There a bad reward reaches the losses of all ranks.
    "ZeRO-2": ([ZERO2, "objective.preset=lmops", "data.plain_text=null"], STEPS, BAD),
    "ZeRO-3": (["objective.whitening=none", "data.plain_text=null"], STEPS, BAD),
    "TP 2": ([*TP, "data.plain_text=null"], STEPS, BAD),
    "TP 2, ZeRO-2": ([*TP, ZERO2, SFT, "data.plain_text=null"], 3, {"1": "gradient"}),
    "TP 2, ZeRO-0": ([*TP, "parallel.deepspeed={zero0}", SFT, "data.plain_text=null"], 3, {"1": "gradient"}),
    "ZeRO-0": ([TAID, "data.plain_text=null", "parallel.deepspeed={zero0}"], 5, {"1": "loss", "3": "gradient"}),
    "bf16": ([SFT, "precision=bf16", "parallel.deepspeed={unchecked}"], 3, {"1": "gradient"}),
    "fp16": ([SFT, "precision=fp16", "parallel.deepspeed={fp16}"], 10, {"8": "loss"}),
}
ALONE: dict[str, tuple[list[str], int, dict[str, str]]] = {
    "too many": (TOO_MANY, 6, {"1": "loss", "4": "loss", "5": "teacher"}),
    "resumed": ([*TOO_MANY, "run.folder={too many}"], 6, {"4": "loss", "5": "teacher"}),
    "repeats": ([ZERO2, "rollout.temperature=0.01", "fault.min_distinct=0.99", "log.wandb=offline"], 1, {}),
    "blind teacher": ([ZERO2, "teacher.path={blind}", "fault.max_bad_steps=0"], 2, {}),
}
JOBS = MIXED | {f"{name} without": job for name, job in MIXED.items()} | ALONE


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory, models_dir: Path, corpus: list[str]) -> Path:
    """A teacher that cannot read the commonest token."""
    folder = tmp_path_factory.mktemp("blind")
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "teacher")
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(models_dir / "teacher", tie_word_embeddings=False)
    ((commonest, _),) = Counter(token for text in corpus for token in tokenizer.encode(text)).most_common(1)
    with torch.no_grad():
        model.model.embed_tokens.weight[commonest] = torch.nan
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def outcome(
    folder: Path, models_dir: Path, records_dir: Path, blind: Path, root: Path, launch: Callable
) -> Callable[[str], list[dict[str, Any]]]:
    """What each rank saw; all runs of one layout come from one start of the ranks."""
    config = {
        "run": {"folder": str(folder / "run"), "seed": 3},
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {"train": str(records_dir / "train"), "plain_text": str(records_dir / "text")},
        "objective": {"name": "minillm"},
        "precision": "fp32",
        "rollout": {"max_new_tokens": 12, "per_round": 16, "inner_epochs": 2, "batch": 16, "alpha": 0.3},
        "optim": {"lr": 1e-2, "batch_size": 8, "micro_batch": 2, "steps": 10, "schedule": "cosine"},
        "parallel": {"deepspeed": str(root / "ds_configs/zero3.json")},
        "checkpoint": {"every": 100, "keep": 9},
        "log": {"wandb": "disabled"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    settings: dict[str, dict[str, Any]] = {
        "zero0": {"zero_optimization": {"stage": 0}},
        "unchecked": {"zero_optimization": {"stage": 1}, "bf16": {"check_grad_overflow": False}},
        "fp16": {"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 20, "hysteresis": 1}},
    }
    paths = {"blind": blind, "too many": folder / "too many"}
    for name, content in settings.items():
        paths[name] = folder / f"{name}.ds.json"
        paths[name].write_text(json.dumps(content))

    def job(name: str) -> dict[str, Any]:
        overrides, steps, bad = JOBS[name]
        filled = [f"run.folder={folder / name}", *overrides]
        for key, path in paths.items():
            filled = [text.replace(f"{{{key}}}", str(path)) for text in filled]
        out = str(folder / name)
        return {"out": out, "overrides": filled, "steps": steps, "bad": bad, "without": name.endswith("without")}

    def get(name: str) -> list[dict[str, Any]]:
        path = folder / f"{name}.json"
        if not path.exists():
            alike = [other for other in JOBS if (TP[0] in JOBS[other][0]) == (TP[0] in JOBS[name][0])]
            jobs = folder / "jobs.json"
            jobs.write_text(json.dumps([job(other) for other in alike]))
            done = launch("tests/ranks/bad_numbers.py", str(folder / "run.yaml"), str(jobs))
            for other in alike:
                (folder / f"{other}.console").write_text(done.stdout + done.stderr)
        return json.loads(path.read_text())

    return get


def records(run: Path) -> list[dict[str, float]]:
    """Each line as JSON knows it, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("name", MIXED)
def test_a_bad_step_never_was(name: str, outcome: Callable, ledger: Ledger) -> None:
    """Nothing of weights and optimizer moves in it, to the bit, and the next goes as if it had been left out."""
    _, steps, bad = MIXED[name]
    for quantity in bad.values():
        ledger[f"one rank's {quantity} not finite"].injected += 1
    for ours, theirs in zip(outcome(name), outcome(f"{name} without"), strict=True):
        for step in map(int, bad):
            assert ours["states"][step + 1] == ours["states"][step]
        assert len(ours["states"]) == steps + 1
        assert ours["states"] == theirs["states"]
        if name != "fp16":
            good = [step for step in range(steps) if str(step) not in bad]
            assert all(ours["states"][step + 1] != ours["states"][step] for step in good)
            sound = [figures["loss/total"] for step, figures in enumerate(ours["figures"]) if str(step) not in bad]
            assert sound == [figures["loss/total"] for figures in theirs["figures"]]
            rates = [figures["optim/lr"] for figures in ours["figures"]]
            assert len(set(rates)) == steps, "the schedule goes by the step, skipped or not"
        assert ours["memory"].get("skipped_steps", 0) == len(bad)


@pytest.mark.parametrize("name", ["ZeRO-2", "ZeRO-3", "TP 2"])
def test_it_is_counted_told_and_kept(name: str, outcome: Callable, folder: Path) -> None:
    outcome(name)
    counts = [(record["fault/skipped_steps"], record["fault/skipped_in_a_row"]) for record in records(folder / name)]
    assert counts == [(0, 0), (1, 1), (1, 0), (2, 1), (2, 0), (3, 1), (3, 0), (4, 1), (4, 0)]
    console = (folder / f"{name}.console").read_text()
    kept = folder / name / "faults"
    for step, quantity in BAD.items():
        number, whole = int(step) + 1, quantity == "gradient"
        where = "" if whole else " on rank 1"
        verb = "are" if quantity == "teacher" else "is"
        told = f"distill: step {number} skipped: the {NAMES[quantity]} {verb} not finite{where}; its batch is kept in"
        assert f"{told} {kept}" in console
        ranks = {path.stem.split("-rank-")[1] for path in kept.glob(f"step-{number:07d}-rank-*.safetensors")}
        assert ranks == ({"0", "1"} if whole else {"1"})
        about = json.loads((kept / f"step-{number:07d}-rank-1.json").read_text())
        assert about["not_finite"] == NAMES[quantity]
        assert len(about["rows"][0]["response"]) > 0
        tensors = load_file(kept / f"step-{number:07d}-rank-1.safetensors")
        assert tensors["0.response_ids"].shape == tensors["0.behavior_logprobs"].shape
        batches = {tensor_name.split(".")[0] for tensor_name in tensors}
        if quantity == "loss":
            assert batches == {"0"}, "the micro-batch in which it arose"
    assert not list(kept.glob(".*"))


def test_too_many_in_a_row_end_the_run(outcome: Callable, folder: Path) -> None:
    for ours in outcome("too many"):
        code, text = ours["ended"]
        assert code == EXIT_BAD_NUMBERS
        assert "step 6 skipped: the teacher's logits are not finite on rank 1" in text
        assert "2 steps in a row, more than fault.max_bad_steps = 1" in text
        assert f"the last good checkpoint is step-0000004 in {folder / 'too many'}" in text
        assert len(ours["figures"]) == 6, "one bad step between good ones is none too many"
    assert len(records(folder / "too many")) == 6, "the last one is on record"
    saved = [path.name for path in (folder / "too many" / "checkpoints").glob("step-*")]
    assert saved == ["step-0000004"], "none after a skipped step: what it was skipped for would be in it"


def test_a_resumed_run_counts_on(outcome: Callable) -> None:
    """From its checkpoint it comes to the same end."""
    for ours, theirs in zip(outcome("resumed"), outcome("too many"), strict=True):
        assert ours["ended"] == theirs["ended"]
        assert ours["memory"] == theirs["memory"]
        assert ours["states"] == theirs["states"][4:]


def test_responses_that_repeat_themselves_raise_an_alert(outcome: Callable, folder: Path) -> None:
    outcome("repeats")
    (record,) = records(folder / "repeats")
    text = f"step 1: of a response's 4-grams only {record['rollout/distinct_4']:.2f} are distinct"
    assert f"distill: {text}" in (folder / "repeats.console").read_text()
    (alerts,) = (folder / "repeats" / "wandb").glob("offline-run-*/*.wandb")
    assert b"Repetitive responses" in alerts.read_bytes()
    assert text.encode() in alerts.read_bytes()


def test_a_teacher_that_gives_nan_is_sampled_from_and_named(outcome: Callable, folder: Path) -> None:
    for ours in outcome("blind teacher"):
        code, text = ours["ended"]
        assert code == EXIT_BAD_NUMBERS
        assert "the teacher's logits are not finite on ranks 0, 1" in text
        assert "there is no checkpoint yet" in text
    (record,) = records(folder / "blind teacher")
    assert "loss/total" not in record
    assert record["tokens/response"] > 0
    tensors = load_file(folder / "blind teacher" / "faults" / "step-0000001-rank-0.safetensors")
    assert not tensors["0.teacher_hidden_is_finite"].any()


def test_overflows_of_fp16_are_no_bad_batches(outcome: Callable) -> None:
    for ours in outcome("fp16"):
        figures = ours["figures"]
        overflows = int(figures[-1]["fault/overflows"])
        assert 1 <= overflows <= 7, "2^20 is too much, and a few halvings less is not"
        assert [row["fault/skipped_steps"] for row in figures] == [0] * 8 + [1, 1]
        scales = [row["optim/loss_scale"] for row in figures]
        assert scales[:overflows] == [2.0 ** (19 - number) for number in range(overflows)]
        assert set(scales[overflows:]) == {2.0 ** (20 - overflows)}, "a bad loss does not lower it"


def test_an_objective_learns_nothing_of_a_bad_step(outcome: Callable) -> None:
    for ours, theirs in zip(outcome("ZeRO-0"), outcome("ZeRO-0 without"), strict=True):
        kept = ("t", "momentum", "loss")
        assert [ours["memory"][name] for name in kept] == [theirs["memory"][name] for name in kept]
