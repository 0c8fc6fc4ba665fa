"""Every objective on 2 real ZeRO-3 ranks: its own loss falls within a few steps. SFT and MiniLLM: test_launch.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_llama, train_tokenizer

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe
from distill.config import Config
from distill.doctor import examine

pytestmark = pytest.mark.slow

# Settings, the figure that must fall, and the share of its start that it must fall to.
OBJECTIVES: dict[str, tuple[dict[str, object], str, float]] = {
    "kd forward_kl + ce": ({"name": "kd", "ce_weight": 0.5}, "loss/total", 0.9),
    "kd akl at temperature 2": ({"name": "kd", "divergence": "akl", "temperature": 2.0}, "loss/akl", 0.9),
    "gkd": ({"name": "gkd", "on_policy": 0.5}, "loss/jsd", 0.9),
    "kd skew_rkl on-policy": ({"name": "kd", "divergence": "skew_rkl", "on_policy": 1.0}, "loss/skew_rkl", 0.9),
    "opd": ({"name": "opd", "reward_clip": 5.0}, "student/reverse_kl", 0.95),
    "seqkd": ({"name": "seqkd"}, "loss/sft", 0.9),
    "distillm": ({"name": "distillm", "start": 0.5, "adapt_every": 10}, "loss/skew_rkl", 0.9),
    "distillm2": ({"name": "distillm2"}, "loss/total", 0.9),
    # Its target moves away as the student comes near: t stays where it is, so that the loss can be watched.
    "taid": ({"name": "taid", "start": 0.7, "end": 0.7}, "loss/taid", 0.9),
    "uld on a mix": ({"name": "uld", "ce_weight": 0.0, "on_policy": 0.5}, "loss/uld", 0.95),
}


@pytest.fixture(scope="module")
def foreign_teacher(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A teacher with a smaller tokenizer of its own."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = train_tokenizer(corpus, size=400, special=["<end>"])
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer), 2, 5, initializer_range=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written_by_teacher(tmp_path_factory: pytest.TempPathFactory, models_dir: Path, records_dir: Path) -> Path:
    """The training records, as if the teacher had written them."""
    folder = tmp_path_factory.mktemp("written")
    rows = [json.loads(line) for line in (records_dir / "train.jsonl").read_text().splitlines()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row | {"written_by": "teacher"}) + "\n" for row in rows))
    recipe = Recipe(str(models_dir / "student"), "chat", max_prompt=64, max_length=96)
    preprocess([str(folder / "rows.jsonl")], folder / "records", recipe, workers=1)
    return folder / "records"


# What these learn from the run, or hold of it, a checkpoint must keep.
WITH_MEMORY: dict[str, dict[str, object]] = {
    "gkd": {"on_policy": 0.7},
    # A step size that moves t ahead of its line.
    "taid": {"step_size": 0.5},
    "distillm": {"start": 0.5, "adapt_every": 2, "replay": 16, "tolerance": 0},
    "distillm2": {},
}


@pytest.fixture(scope="module")
def base(models_dir: Path, records_dir: Path) -> dict[str, Any]:
    return {
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {"train": str(records_dir / "train")},
        "precision": "fp32",
        "rollout": {"alpha": 0.0, "max_new_tokens": 12, "per_round": 32, "inner_epochs": 1, "batch": 16},
        "log": {"wandb": "disabled"},
    }


def falling(case: str, base: dict[str, Any], records_dir: Path, foreign: Path, written: Path) -> dict[str, Any]:
    """30 steps of one objective."""
    config = base | {"run": {"folder": case, "seed": 1}, "objective": OBJECTIVES[case][0], "checkpoint": {"every": 100}}
    config["optim"] = {"lr": 3e-3, "batch_size": 16, "micro_batch": 4, "steps": 30}
    if case == "seqkd":
        config["data"] = {"train": str(written)}
        del config["rollout"]
    if case == "uld on a mix":
        config["teacher"] = {"path": str(foreign)}
    if case == "distillm":
        config["data"] = config["data"] | {"valid": str(records_dir / "valid")}
        config["rollout"] = {"alpha": 0.0, "max_new_tokens": 12, "batch": 16}
    return config


def resumed(name: str, base: dict[str, Any], records_dir: Path) -> dict[str, Any]:
    """10 steps in rounds of 4, with a checkpoint after the third."""
    config = base | {"run": {"folder": f"resumed {name}", "seed": 5}, "objective": {"name": name, **WITH_MEMORY[name]}}
    config["optim"] = {"lr": 5e-3, "batch_size": 8, "micro_batch": 2, "steps": 10, "schedule": "cosine"}
    config["data"] = config["data"] | {"valid": str(records_dir / "valid")}
    config["rollout"] = {"max_new_tokens": 12, "batch": 8}
    if name in ("gkd", "distillm2"):
        config["rollout"] |= {"per_round": 16, "inner_epochs": 2, "teacher_cache": "host"}
    return config | {"evaluation": {"every": 5, "prompts": 7}, "checkpoint": {"every": 3, "keep": 9}}


@pytest.fixture(scope="module")
def runs(
    launch: Callable,
    base: dict[str, Any],
    records_dir: Path,
    foreign_teacher: Path,
    written_by_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of all runs, made by one start of the ranks."""
    folder = tmp_path_factory.mktemp("runs")
    configs = [falling(case, base, records_dir, foreign_teacher, written_by_teacher) for case in OBJECTIVES]
    configs += [resumed(name, base, records_dir) for name in WITH_MEMORY]
    jobs = []
    for config in configs:
        name = config["run"]["folder"]
        config["run"] |= {"folder": str(folder / name)}
        assert not examine(Config.model_validate(config), 2).problems
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        jobs.append({"config": str(folder / f"{name}.yaml")})
        if name.startswith("resumed"):
            kept = str(folder / f"whole {name}")
            jobs += [{"rewind": str(folder / name), "to": "step-0000003", "kept": kept}, jobs[-1]]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("tests/ranks/train_many.py", str(folder / "jobs.json"))
    assert done.stderr.count("resumed ") >= len(WITH_MEMORY)
    return folder


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", OBJECTIVES)
def test_its_own_loss_falls(case: str, runs: Path) -> None:
    _, figure, share = OBJECTIVES[case]
    rows = [row for row in records(runs / case) if figure in row]
    values = [row[figure] for row in rows]
    assert len(values) == 30
    assert sum(values[-6:]) < share * sum(values[:6])
    if case != "seqkd":
        # Each token passed through the teacher once, to sample, score and answer for it in the loss.
        assert {row["teacher/forwards_per_token"] for row in rows} == {1.0}
        sampled = [row for row in rows if "rollout/response_length" in row]
        assert {row["rollout/student_forwards_per_token"] for row in sampled} <= {1.0}


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_what_an_objective_has_learnt_survives(name: str, runs: Path) -> None:
    """Taken up again from its checkpoint at step 3, within a round, a run comes to the same end, to the bit."""
    timings = ("time/", "memory/", "tokens/per_second")
    ours, theirs = (
        [{key: value for key, value in row.items() if not key.startswith(timings)} for row in records(run)]
        for run in (runs / f"resumed {name}", runs / f"whole resumed {name}")
    )
    assert len([row for row in ours if "loss/total" in row]) == 10
    assert ours == theirs
    students = [
        load_file(run / "student" / "model.safetensors")
        for run in (runs / f"resumed {name}", runs / f"whole resumed {name}")
    ]
    assert all(bool((students[0][key] == students[1][key]).all()) for key in students[1])
