"""Every objective on 2 real ZeRO-3 ranks: its own loss falls within a few steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_llama, train_tokenizer

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe

pytestmark = pytest.mark.slow

# Settings, the figure that must fall, and the share of its start that it must fall to.
OBJECTIVES: dict[str, tuple[dict[str, object], str, float]] = {
    "kd forward_kl + ce": ({"name": "kd", "ce_weight": 0.5}, "loss/total", 0.9),
    "kd akl at temperature 2": ({"name": "kd", "divergence": "akl", "temperature": 2.0}, "loss/akl", 0.9),
    "gkd": ({"name": "gkd", "on_policy": 0.5}, "loss/jsd", 0.9),
    "kd skew_rkl on-policy": ({"name": "kd", "divergence": "skew_rkl", "on_policy": 1.0}, "loss/skew_rkl", 0.9),
    "opd": ({"name": "opd", "reward_clip": 5.0}, "student/reverse_kl", 0.95),
    "minillm": ({"name": "minillm"}, "student/reverse_kl", 0.95),
    "sft": ({"name": "sft"}, "loss/sft", 0.9),
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


@pytest.mark.parametrize("case", OBJECTIVES)
def test_its_own_loss_falls(
    case: str,
    launch: Callable,
    models_dir: Path,
    records_dir: Path,
    foreign_teacher: Path,
    written_by_teacher: Path,
    tmp_path: Path,
) -> None:
    objective, figure, share = OBJECTIVES[case]
    teacher = foreign_teacher if case.startswith("uld") else models_dir / "teacher"
    config: dict[str, Any] = {
        "run": {"folder": str(tmp_path / "run"), "seed": 1},
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(teacher)},
        "data": {"train": str(written_by_teacher if case == "seqkd" else records_dir / "train")},
        "objective": objective,
        "precision": "fp32",
        "rollout": {"alpha": 0.0, "max_new_tokens": 12, "per_round": 32, "inner_epochs": 1, "batch": 16},
        "optim": {"lr": 3e-3, "batch_size": 16, "micro_batch": 4, "steps": 30},
        "checkpoint": {"every": 100},
        "log": {"wandb": "disabled"},
    }
    if case in ("sft", "seqkd", "kd forward_kl + ce", "kd akl at temperature 2", "taid"):
        del config["rollout"]
    if case == "distillm":
        config["data"]["valid"] = str(records_dir / "valid")
        config["rollout"] = {"alpha": 0.0, "max_new_tokens": 12, "batch": 16}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launch("launch/train.sh", "--config", str(tmp_path / "run.yaml"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [row[figure] for row in rows if figure in row]
    assert len(values) == 30
    assert sum(values[-6:]) < share * sum(values[:6])
    if case not in ("sft", "seqkd"):
        # Each token passed through the teacher once, to sample, score and answer for it in the loss.
        assert {row["teacher/forwards_per_token"] for row in rows if figure in row} == {1.0}
