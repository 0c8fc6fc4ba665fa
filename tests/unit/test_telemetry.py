"""What is logged, and where."""

import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from distill.config import Config
from distill.dashboards.board import Dashboard
from distill.telemetry import METRICS, Telemetry


def test_a_wandb_that_is_gone_costs_no_run(good: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """Who ends a launch may end its process first."""

    class Gone(Dashboard):
        name = "wandb"

        def alert(self, title: str, text: str) -> None:
            raise ConnectionResetError("Connection lost")

        log = show = close = alert

    Path(good["run"]["folder"]).mkdir()
    telemetry = Telemetry(Config.model_validate(good | {"log": {"wandb": "disabled"}}), True, 0)
    telemetry._boards = [Gone()]
    telemetry.alert("a", "b")
    for step in (1, 2):
        telemetry.log(step, {"loss/total": 1.0})
    telemetry.close()
    said = capsys.readouterr().err
    assert said.count("distill: wandb is lost (ConnectionResetError: Connection lost); metrics.jsonl has every") == 1
    assert len((Path(good["run"]["folder"]) / METRICS).read_text().splitlines()) == 2


def test_a_wandb_that_does_not_start_costs_no_run(
    good: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**settings: object) -> None:
        raise wandb.errors.CommError("the server is out of reach")

    monkeypatch.setattr(wandb, "init", init)
    Path(good["run"]["folder"]).mkdir()
    telemetry = Telemetry(Config.model_validate(good | {"log": {"wandb": "online"}}), True, 0)
    telemetry.alert("a", "b")
    telemetry.close()
    assert "distill: wandb does not start (CommError: the server is out of reach)" in capsys.readouterr().err


def test_a_bar_on_a_full_disk_goes_on(root: Path) -> None:
    text = """
import os
from distill.telemetry import progress, warn
with progress(3, "x", True) as bar:
    for _ in range(3):
        bar.update()
        bar.refresh()
        warn("y" * 20000)
os._exit(7)
"""
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", text], cwd=root, stderr=full, check=False).returncode == 7


def test_a_line_stands_above_the_bar(root: Path) -> None:
    text = "from distill.telemetry import progress, warn; bar = progress(3, 'what', True); warn('told'); bar.close()"
    done = subprocess.run([sys.executable, "-c", text], cwd=root, stderr=subprocess.PIPE, text=True, check=True)
    assert " \ndistill: told\n" in done.stderr, "the bar was cleared first"
