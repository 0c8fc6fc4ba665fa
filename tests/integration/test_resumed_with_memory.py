"""A run that was killed and taken up again is the run that was not, to the bit, whatever it has to remember.

That is what an objective has learnt, the masks of dropout, skipped steps, alarms in the middle of their window, and
fp16's loss scale.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from reference.chance import record_at
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

pytestmark = pytest.mark.slow

KILLED_AFTER, STEPS = 3, 10
UNEQUAL = ("time/", "memory/", "tokens/per_second")

# Name → the objective and other sections. What an objective learns from the run, or holds of it, a checkpoint keeps.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gkd": ({"name": "gkd", "on_policy": 0.7}, {}),
    # A step size that moves t ahead of its line.
    "taid": ({"name": "taid", "step_size": 0.5}, {}),
    "distillm": ({"name": "distillm", "start": 0.5, "adapt_every": 2, "replay": 16, "tolerance": 0}, {}),
    "distillm2": ({"name": "distillm2"}, {}),
    # The student has dropout; one record holds a token that the teacher cannot read, and its step is skipped.
    "dropout": ({"name": "kd", "divergence": "jsd"}, {"student": "dropout", "teacher": "blind", "metric": "loss"}),
    "fp16": ({"name": "sft"}, {"precision": "fp16", "deepspeed": "fp16", "metric": "loss"}),
}


@pytest.fixture(scope="module")
def special(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, records_dir: Path
) -> dict[str, Path]:
    """A student with dropout, a teacher that is blind to one rare token, and DeepSpeed's settings for fp16."""
    folder = tmp_path_factory.mktemp("special")
    rows = datasets.load_from_disk(str(records_dir / "train"))
    seen = Counter(token for row in rows for token in {*row["prompt_ids"], *row["response_ids"]})
    # Within the first two steps of the run.
    early = [rows[record_at(place, len(rows), seed=5)] for place in range(2 * 8)]
    told = {token for row in early for token in (*row["prompt_ids"], *row["response_ids"])}
    rare = next(token for token in sorted(told) if seen[token] == 1 and token > 20)
    torch.manual_seed(4)
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    student = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, initializer_range=0.1))
    assert student.config.resid_pdrop == student.config.embd_pdrop == student.config.attn_pdrop == 0.1
    blind = tiny_llama(len(tokenizer), 2, 6, initializer_range=0.1, tie_word_embeddings=False)
    with torch.no_grad():
        blind.model.embed_tokens.weight[rare] = torch.nan
    for name, model in (("dropout", student), ("blind", blind)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    scale = {"initial_scale_power": 22, "loss_scale_window": 3, "hysteresis": 1}
    (folder / "fp16").write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": scale}))
    return {name: folder / name for name in ("dropout", "blind", "fp16")}


@pytest.fixture(scope="module")
def runs(
    launch: Callable,
    models_dir: Path,
    records_dir: Path,
    special: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of all runs, made by one start of the ranks; `whole NAME` is the one that was not killed."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[dict[str, str]] = []
    for name, (objective, sections) in RUNS.items():
        config: dict[str, Any] = {
            "run": {"folder": str(folder / name), "seed": 5},
            "student": {"path": str(special.get(sections.get("student", ""), models_dir / "student"))},
            "teacher": {"path": str(special.get(sections.get("teacher", ""), models_dir / "teacher"))},
            "data": {split: str(records_dir / split) for split in ("train", "valid")},
            "objective": objective,
            "precision": sections.get("precision", "fp32"),
            "optim": {"lr": 5e-3, "batch_size": 8, "micro_batch": 2, "steps": STEPS, "schedule": "cosine"},
            "rollout": {"max_new_tokens": 12, "batch": 8},
            # One before the kill: whatever mode a validation leaves the student in, a resumed run must not differ.
            "evaluation": {"every": 2, "prompts": 7, "metric": sections.get("metric", "auto")},
            "checkpoint": {"every": KILLED_AFTER, "keep": 9},
            "log": {"wandb": "disabled"},
        }
        if name in ("gkd", "distillm2"):
            config["rollout"] |= {"per_round": 16, "inner_epochs": 2, "teacher_cache": "host"}
        if objective["name"] == "sft":
            del config["teacher"], config["rollout"]
        if "deepspeed" in sections:
            config["parallel"] = {"deepspeed": str(special[sections["deepspeed"]])}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        start = {"config": str(folder / f"{name}.yaml")}
        tag, kept = f"step-{KILLED_AFTER:07d}", str(folder / f"whole {name}")
        jobs += [start, {"rewind": str(folder / name), "to": tag, "kept": kept}, start]
    jobs.append({"seeds": str(folder / "dropout.yaml"), "out": str(folder / "seeds.json")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("tests/ranks/train_many.py", str(folder / "jobs.json"))
    assert done.stdout.count(f"at step {KILLED_AFTER}\n") == len(RUNS), "all were resumed"
    return folder


def records(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(UNEQUAL)} for line in lines]


def memory(run: Path, step: int = STEPS) -> dict[str, dict[str, float]]:
    """What the checkpoint of a step says that the run remembers."""
    text = (run / f"checkpoints/step-{step:07d}/manifest.json").read_text()
    found: dict[str, dict[str, float]] = json.loads(text)["content"]["state"]["memory"]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_same_to_the_bit(name: str, runs: Path) -> None:
    ours, whole = runs / name, runs / f"whole {name}"
    assert len([row for row in records(ours) if "optim/lr" in row]) == STEPS
    assert records(ours) == records(whole)
    assert memory(ours) == memory(whole)
    files = sorted(path.name for path in (whole / f"checkpoints/step-{STEPS:07d}").glob("*.safetensors"))
    assert len(files) >= 4, "weights and random numbers of two ranks"
    for name in [f"checkpoints/step-{STEPS:07d}/{file}" for file in files] + ["student/model.safetensors"]:
        ours_has, theirs = load_file(ours / name), load_file(whole / name)
        assert ours_has.keys() == theirs.keys()
        assert all(torch.equal(ours_has[key], theirs[key]) for key in theirs), name


def test_a_skipped_step_does_not_hold_the_schedule_back(runs: Path) -> None:
    rates = [row["optim/lr"] for row in records(runs / "whole dropout") if "optim/lr" in row]
    cosine = [5e-3 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    assert rates == pytest.approx(cosine, rel=1e-9)


def test_there_was_something_to_remember(runs: Path) -> None:
    """At the kill a step had been skipped, the alarms knew of earlier losses, and the loss scale had moved."""
    kept = memory(runs / "whole dropout", KILLED_AFTER)
    assert kept["bad_steps"]["skipped_steps"] >= 1
    assert kept["alarms"]["loss/total recorded count"] == KILLED_AFTER - kept["bad_steps"]["skipped_steps"]
    scales = [row["optim/loss_scale"] for row in records(runs / "whole fp16") if "optim/loss_scale" in row]
    assert scales[KILLED_AFTER - 1] < 2**22, "it fell"
    assert max(scales[KILLED_AFTER:]) > min(scales), "and rises again after the kill"
    assert memory(runs / "whole fp16", KILLED_AFTER)["bad_steps"]["overflows"] >= 1


def test_each_rank_has_masks_of_its_own(runs: Path, root: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Dropout's seed differs by rank. On another number of ranks a resumed run must not repeat its first masks."""
    fresh = json.loads((runs / "seeds.json").read_text())
    assert fresh == [5 * 2**16, 5 * 2**16 + 1]
    config = yaml.safe_load((runs / "dropout.yaml").read_text())
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(config))
    jobs = [{"seeds": str(tmp_path / "alone.yaml"), "keep": True, "out": str(tmp_path / "seeds.json")}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "tests/ranks/train_many.py", str(tmp_path / "jobs.json")]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=300)
    (resumed,) = json.loads((tmp_path / "seeds.json").read_text())
    assert resumed not in fresh
    assert resumed == (5 * 2**16 + (STEPS << 40)) % 2**63
