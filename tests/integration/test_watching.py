"""What the shipped workspace shows is what runs log, and a resumed run is one run on every dashboard."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb_file
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import load
from distill.dashboards.tensorboard_board import TENSORBOARD
from tools import dashboard

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    models_dir: Path,
    records_dir: Path,
    root: Path,
    environment: dict[str, str],
) -> Path:
    """MiniLLM on one rank: two steps of three, then all of them."""
    folder = tmp_path_factory.mktemp("watched")
    config: dict[str, Any] = {
        "run": {"folder": str(folder / "run")},
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {name: str(records_dir / name) for name in ("train", "valid")},
        "objective": {"name": "minillm"},
        "precision": "fp32",
        "optim": {"steps": 3, "batch_size": 4, "micro_batch": 4},
        "rollout": {"per_round": 8, "max_new_tokens": 8, "inner_epochs": 1},
        "parallel": {"deepspeed": str(root / "ds_configs/zero1.json")},
        "evaluation": {"every": 1, "prompts": 2, "seeds": 2},
        "log": {"wandb": "offline", "tensorboard": True},
    }
    config["data"]["plain_text"] = str(records_dir / "text")
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    for steps in (2, 3):
        command = ["-m", "distill", "train", "--config", str(folder / "run.yaml"), f"optim.steps={steps}"]
        done = subprocess.run(
            [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if steps == 2:
            (folder / "run/wandb").rename(folder / "run/first")
    return folder / "run"


def test_every_metric_of_the_shipped_workspace_is_logged(run: Path, root: Path) -> None:
    found = wandb_file.records(run)
    logged = {name for row in found["history"] for name in wandb_file.values(row.item)}
    facts = {name for summary in found["summary"] for name in wandb_file.values(summary.update)}
    spec = dashboard.load_spec(root / dashboard.SPEC)
    panels = [panel for listed in spec.sections.values() for panel in listed]
    lines = {name for panel in panels for name in panel.line}
    assert lines - logged == set()
    assert {panel.x for panel in panels} <= logged
    scalars = {panel.scalar for panel in panels if panel.scalar} | set(spec.columns)
    assert scalars - facts == set()
    assert {f"{panel.table}/_type" for panel in panels if panel.table} <= logged
    told = {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert lines <= told, "and stands in metrics.jsonl by that name"


def test_the_summary_says_how_it_went(run: Path) -> None:
    facts: dict[str, Any] = {}
    for summary in wandb_file.records(run)["summary"]:
        facts |= wandb_file.values(summary.update)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["valid/rouge_l"] for row in rows if "valid/rouge_l" in row}
    assert (facts["total/steps"], facts["ended"]) == (3, "all its steps or minutes are done")
    assert facts["best/rouge_l"] == max(scores.values()) == scores[facts["best/step"]]
    tokens = [row["tokens/response"] for row in rows if "tokens/response" in row]
    assert facts["total/tokens"] == sum(tokens) == rows[-1]["tokens/total"], "over both starts"
    assert facts["total/minutes"] == pytest.approx(rows[-1]["time/total"] / 60)


def test_the_second_start_goes_on_with_the_first_run(run: Path) -> None:
    (second,) = wandb_file.records(run)["run"]
    assert second.run_id == (run / "wandb-id").read_text().strip()
    assert list(run.glob(f"first/offline-run-*/run-{second.run_id}.wandb"))
    assert [wandb_file.values(row.item)["step"] for row in wandb_file.records(run)["history"]] == [3]
    settings = wandb_file.values(second.config.update)
    expected = load(run / "config.yaml").model_dump(mode="json")
    assert {name: settings[name] for name in expected} == expected
    events = EventAccumulator(str(run / TENSORBOARD), size_guidance={"scalars": 0})
    events.Reload()
    for name in ("loss/total", "valid/rouge_l", "tokens/total"):
        steps = [event.step for event in events.Scalars(name)]
        assert sorted(set(steps)) == [1, 2, 3]
        assert len(steps) == (6 if name == "tokens/total" else 3)
