"""What wandb and TensorBoard are told, read back from their own files."""

import builtins
import json
import os
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import wandb
import wandb_file
from run_configs import problems
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_workspaces.workspaces import interface, internal

from distill.config import Config
from distill.dashboards.glimpse import ROLLOUTS, distributions
from distill.dashboards.tensorboard_board import TENSORBOARD
from distill.data.batches import Rollouts
from distill.telemetry import METRICS, Telemetry
from tools import dashboard

UMASK = 0o027
SECRET = "5ecr3tmark"
LENGTHS = (3, 1)
TEXTS = [
    {"prompt": "Why?", "response": "So *it* is.\n\n    <b>", "reward": -1.5, "teacher_share": 0.25},
    {"prompt": "Où?", "response": "", "reward": float("-inf"), "teacher_share": 0.0},
]


def rollouts() -> Rollouts:
    """Two rows; what stands at padding must not be seen, and one reward is not finite."""
    mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    return Rollouts(
        prompt_ids=torch.ones(2, 2, dtype=torch.long),
        prompt_lengths=torch.tensor([2, 2]),
        response_ids=torch.ones(2, 3, dtype=torch.long),
        response_lengths=torch.tensor(LENGTHS),
        behavior_logprobs=torch.where(mask, -2.0, 99.0),
        teacher_logprobs=torch.tensor([[-1.0, -3.0, -torch.inf], [-2.5, 0.0, 0.0]]),
        importance_weights=torch.tensor([[1.0, 0.5, 2.0], [1.5, 77.0, 77.0]]),
        from_teacher=torch.zeros(2, 3, dtype=torch.bool),
        ended=torch.tensor([True, False]),
        teacher_forwards=torch.tensor(LENGTHS),
    )


def settings(folder: Path, **log: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": str(folder)},
            "student": {"path": "s"},
            "data": {"train": "d"},
            "objective": {"name": "sft"},
            "optim": {"steps": 40},
            "log": {"wandb": "disabled"} | log,
        }
    )


def tell(telemetry: Telemetry, steps: range) -> None:
    """A run's records: figures at every step, rollouts at every second."""
    for step in steps:
        telemetry.log(step, {"loss/total": 1 / step, "reward/mean": float("nan")})
        if step % 2:
            telemetry.samples(step, TEXTS, rollouts())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 23 steps that both were told of, under another umask and with keys in the environment."""
    folder = tmp_path_factory.mktemp("runs") / "told"
    before, keys = os.umask(UMASK), {"WANDB_API_KEY": SECRET + "0" * 30, "HF_TOKEN": SECRET}
    os.environ.update(keys)
    try:
        folder.mkdir()
        telemetry = Telemetry(settings(folder, wandb="offline", tensorboard=True), True, 0)
        tell(telemetry, range(1, 24))
        telemetry.alert("Loss spike", "it leapt")
        telemetry.summarise({"best/rouge_l": 12.5, "best/step": 20, "ended": "because"})
        telemetry.close()
    finally:
        os.umask(before)
        for name in keys:
            del os.environ[name]
    return folder


def test_what_is_seen_of_rollouts_is_the_real_tokens() -> None:
    found = distributions(rollouts())
    assert found["distribution/response_length"].tolist() == [3, 1]
    assert found["distribution/importance_weight"].tolist() == [1, 0.5, 2, 1.5]
    assert found["distribution/reward"].tolist() == [1, -1, -0.5], "what is not finite is left out"


def test_wandb_gets_figures_over_the_steps(told: Path) -> None:
    found = wandb_file.records(told)
    rows = [wandb_file.values(row.item) for row in found["history"]]
    assert [(row["step"], row["_step"]) for row in rows] == [(step, step) for step in range(1, 24)]
    assert [row["loss/total"] for row in rows] == [1 / step for step in range(1, 24)]
    assert not any("reward/mean" in row for row in rows), "not a number"
    metrics = {metric.name or metric.glob_name: metric.step_metric for metric in found["metric"]}
    assert metrics == {"step": "", "*": "step"}
    assert [alert.title for alert in found["alert"]] == ["Loss spike"]
    facts: dict[str, Any] = {}
    for summary in found["summary"]:
        facts |= wandb_file.values(summary.update)
    assert (facts["best/rouge_l"], facts["best/step"], facts["ended"]) == (12.5, 20, "because")


def test_wandb_gets_a_table_and_histograms_now_and_then(told: Path) -> None:
    rows = [wandb_file.values(row.item) for row in wandb_file.records(told)["history"]]
    shown = [row for row in rows if f"{ROLLOUTS}/_type" in row]
    assert [row["step"] for row in shown] == [1, 11, 21]
    (files,) = told.glob("wandb/offline-run-*/files")
    table = json.loads((files / shown[1][f"{ROLLOUTS}/path"]).read_text())
    assert table["columns"] == ["step", "prompt", "response", "reward", "teacher_share"]
    assert table["data"] == [[11, *TEXTS[0].values()], [11, "Où?", "", None, 0.0]]
    counts, bins = (shown[0][f"distribution/reward/{name}"] for name in ("values", "bins"))
    assert sum(counts) == 3
    assert (bins[0], bins[-1]) == (-1, 1)


def test_wandb_keeps_all_of_a_run_in_its_folder(told: Path) -> None:
    """Copies of tables too, for `wandb sync`, with the rights that the umask says, and no key in any file."""
    staged = [Path(record.manifest.contents[0].local_path) for record in wandb_file.records(told)["artifact"]]
    assert len(staged) == 3
    assert all(path.is_file() and path.is_relative_to(told) for path in staged)
    files = [path for path in told.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~UMASK}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert "WANDB_DATA_DIR" not in os.environ


def test_wandb_gets_the_settings(told: Path) -> None:
    (run,) = wandb_file.records(told)["run"]
    found = wandb_file.values(run.config.update)
    expected = settings(told, wandb="offline", tensorboard=True).model_dump(mode="json")
    assert {name: found[name] for name in expected} == expected


def read(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / TENSORBOARD), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    return events


def test_tensorboard_gets_the_same_by_the_same_names(told: Path) -> None:
    events = read(told)
    records = [json.loads(line) for line in (told / METRICS).read_text().splitlines()]
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    names = {name for record in records for name in record} - {"step"}
    assert set(scalars) == names
    for name in names:
        assert scalars[name] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in records if name in row]
    assert [(h.step, h.histogram_value.num) for h in events.Histograms("distribution/reward")] == [
        (1, 3),
        (11, 3),
        (21, 3),
    ]
    texts = events.Tensors(f"{ROLLOUTS}/text_summary")
    assert [text.step for text in texts] == [1, 11, 21]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.splitlines() if line), "Markdown changes nothing of it"
    first, second = text.split("\n\n")
    assert json.loads(first) == TEXTS[0]
    assert json.loads(second) == {name: value for name, value in TEXTS[1].items() if name != "reward"}


def test_a_resumed_run_shows_no_step_twice_in_tensorboard(tmp_path: Path) -> None:
    """Killed at step 9, taken up from the checkpoint at 6, with other figures."""
    config = settings(tmp_path, tensorboard=True)
    killed = Telemetry(config, True, 0)
    tell(killed, range(1, 10))
    killed.flush()
    resumed = Telemetry(config, True, 6)
    for step in range(7, 13):
        resumed.log(step, {"loss/total": 100.0 + step})
    resumed.close()
    killed.close()
    found = [(event.step, event.value) for event in read(tmp_path).Scalars("loss/total")]
    assert [step for step, _ in found] == list(range(1, 13))
    assert found[6:] == [(step, 100 + step) for step in range(7, 13)]
    assert len(list((tmp_path / TENSORBOARD).iterdir())) == 2


def test_a_tensorboard_that_cannot_be_written_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / TENSORBOARD).write_text("a file")
    telemetry = Telemetry(settings(tmp_path, tensorboard=True), True, 0)
    telemetry.log(1, {"loss/total": 1.0})
    telemetry.close()
    assert "distill: TensorBoard does not start (" in capsys.readouterr().err
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 1, "loss/total": 1.0}


def test_without_dashboards_neither_library_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are rollouts brought to the host for them."""
    imported, threads = [], threading.active_count()
    real = builtins.__import__

    def note(name: str, *rest: Any, **more: Any) -> Any:
        imported.append(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", note)
    monkeypatch.setattr("distill.telemetry.distributions", lambda rollouts: pytest.fail("looked at"))
    telemetry = Telemetry(settings(tmp_path), True, 0)
    tell(telemetry, range(1, 4))
    telemetry.close()
    assert not [name for name in imported if name.startswith(("wandb", "distill.dashboards", "torch.utils.tensorb"))]
    assert threading.active_count() == threads
    assert np.shape((tmp_path / "samples.jsonl").read_text().splitlines()) == (4,)


@pytest.mark.parametrize("asked", ["log", "show", "summarise", "alert", "flush", "close"])
def test_a_dashboard_that_dies_costs_no_run(asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is asked when it does; the other one goes on."""

    def die(*given: object) -> None:
        raise BrokenPipeError("gone")

    telemetry = Telemetry(settings(tmp_path, tensorboard=True), True, 0)
    silent = {name: lambda *given: None for name in ("log", "show", "summarise", "alert", "flush", "close")}
    telemetry._boards.insert(0, cast(Any, SimpleNamespace(name="wandb", **silent | {asked: die})))
    tell(telemetry, range(1, 4))
    telemetry.summarise({"ended": "x"})
    telemetry.alert("a", "b")
    telemetry.close()
    said = capsys.readouterr().err
    assert said.count("distill: wandb is lost (BrokenPipeError: gone); metrics.jsonl has everything") == 1
    assert [event.step for event in read(tmp_path).Scalars("loss/total")] == [1, 2, 3]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 3


def test_tensorboard_is_needed_only_where_it_is_asked_for(good: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = good | {"log": {"tensorboard": True}}
    assert problems(asked) == []
    monkeypatch.setattr("distill.checks.outputs.find_spec", lambda name: None)
    assert problems(good) == []
    wrong = "log.tensorboard = True: tensorboard is not installed; pip install tensorboard, or remove it"
    assert problems(asked) == [wrong]


def test_without_the_library_of_workspaces_one_line_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "me", "--project", "mine"])
    assert dashboard.main() == 2
    wrong = "'wandb-workspaces': is not installed; pip install wandb-workspaces==0.4.13\n"
    assert capsys.readouterr().err == f"dashboard: tools.dashboard = {wrong}"


def test_without_a_key_one_line_says_so(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "me", "--project", "mine"])
    monkeypatch.chdir(root)
    assert dashboard.main() == 2
    wrong = "WANDB_API_KEY = None: there is no key for wandb; set it, or run `wandb login`\n"
    assert capsys.readouterr().err == f"dashboard: {wrong}"


def test_what_would_be_sent_can_be_read_without_a_network(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--entity", "me", "--project", "mine", "--dry-run", "--json", str(tmp_path / "view.json")]
    monkeypatch.setattr(sys, "argv", ["dashboard", *words])
    monkeypatch.chdir(root)
    assert dashboard.main() == 0
    spec = dashboard.load_spec(root / dashboard.SPEC)
    assert list(panels(json.loads((tmp_path / "view.json").read_text()))) == list(spec.sections)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == sum(1 + len(listed) for listed in spec.sections.values()) + 1
    assert "  Rouge-L by tokens: valid/rouge_l over tokens/total" in said


def panels(view: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sections = view["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def test_the_shipped_workspace_is_what_its_file_says(root: Path) -> None:
    spec = dashboard.load_spec(root / dashboard.SPEC)
    view = dashboard.serialised(dashboard.workspace(spec, "me", "mine"))
    found = panels(view)
    assert list(found) == list(spec.sections)
    for name, listed in spec.sections.items():
        for panel, sent in zip(listed, found[name], strict=True):
            config = sent["config"]
            if panel.line:
                assert sent["viewType"] == "Run History Line Plot"
                assert (config["chartTitle"], config["xAxis"]) == (panel.title, panel.x)
                assert config["metrics"] == list(panel.line)
                assert config.get("yLogScale", False) == panel.log_y
            elif panel.scalar:
                assert (sent["viewType"], config["metrics"]) == ("Scalar Chart", [panel.scalar])
            else:
                assert sent["viewType"] == "Weave"
                assert f'"val": "{panel.table}"' in json.dumps(config)
    feed = view["section"]["runSets"][0]["runFeed"]
    assert [name.removeprefix("summary:") for name in feed["columnOrder"] if "summary:" in name] == list(spec.columns)
    assert view["section"]["settings"]["xAxis"] == "step"


def test_a_workspace_is_made_once_and_then_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the server, which no test can reach: it keeps views by the names that it is given."""
    views: dict[str, dict[str, Any]] = {}

    def answer(api: object, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "mutation" in query:
            known = views.get(variables["name"])
            assert variables.get("id") == (known["id"] if known else None)
            views[variables["name"]] = {"id": "7", "displayName": variables["displayName"], "spec": variables["spec"]}
            return {"upsertView": {"view": {"id": "7", "name": variables["name"]}}}
        asked = views.get(variables["viewName"])
        return {"project": {"allViews": {"edges": [{"node": asked}] if asked else []}}}

    monkeypatch.setattr(internal, "execute_graphql", answer)
    monkeypatch.setattr(wandb, "Api", lambda **settings: SimpleNamespace())
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
    spec = dashboard.load_spec(root / dashboard.SPEC)
    first = dashboard.save(dashboard.workspace(spec, "me", "mine"))
    fewer = spec.model_copy(update={"sections": {"Training": spec.sections["Training"]}})
    assert dashboard.save(dashboard.workspace(fewer, "me", "mine")) == first
    assert first.startswith("https://wandb.example/me/mine?nw=")
    (view,) = views.values()
    assert list(panels(json.loads(view["spec"]))) == ["Training"]
