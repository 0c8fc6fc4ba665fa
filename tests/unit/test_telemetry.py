"""What is logged, and where."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from transformers import PreTrainedTokenizerFast

from distill.config import Config
from distill.dashboards.board import Dashboard
from distill.dashboards.glimpse import as_text
from distill.data.batches import Rollouts
from distill.telemetry import METRICS, Stopwatch, Telemetry


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


def test_a_stopwatch_adds_up_a_phase_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 1.0, 3.0, 5.0, 9.0, 20.0, 20.5])
    monkeypatch.setattr("distill.telemetry.time.perf_counter", lambda: next(moments))
    watch = Stopwatch()
    for name in ("forward", "backward", "forward"):
        with watch.phase(name):
            pass
    assert watch.lap() == {"time/forward": 1 + 4, "time/backward": 2}
    with watch.phase("backward"):
        pass
    assert watch.lap() == {"time/backward": 0.5}


@pytest.mark.parametrize(("optim", "ends"), [({}, [3, 7, 10, 10]), ({"max_minutes": 1}, [5, 40, 60, 60])])
def test_the_bar_stands_where_the_run_does(good: dict, optim: dict, ends: list[int]) -> None:
    """At what ends the run: its steps, or its seconds."""
    config = good | {"optim": good["optim"] | {"steps": 10} | optim, "log": {"wandb": "disabled"}}
    Path(good["run"]["folder"]).mkdir()
    telemetry, places = Telemetry(Config.model_validate(config), True, 0), []
    for step, seconds in ((3, 5.2), (7, 40.0), (10, 60.4), (12, 90.0)):
        telemetry.advance(step, seconds)
        places.append(telemetry._bar.n)
    telemetry.close()
    assert places == ends


def test_an_example_rollout_is_shown_with_its_mean_reward(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, lengths = torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([3, 2])
    rollouts = Rollouts(
        prompt_ids=torch.tensor([[0, 8], [9, 9]]),
        prompt_lengths=torch.tensor([1, 2]),
        response_ids=ids,
        response_lengths=lengths,
        behavior_logprobs=torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -4.0, 0.0]]),
        teacher_logprobs=torch.tensor([[-1.5, -1.0, -0.5], [-5.0, -6.0, 0.0]]),
        importance_weights=torch.ones(2, 3),
        from_teacher=torch.tensor([[True, False, False], [True, True, False]]),
        ended=torch.tensor([True, True]),
        teacher_forwards=lengths,
    )
    first, second = as_text(rollouts, 5, tokenizer)
    assert (first["prompt"], first["response"]) == (tokenizer.decode([8]), tokenizer.decode([5, 6, 7]))
    assert (first["reward"], first["teacher_share"]) == pytest.approx(((-0.5 + 1 + 2.5) / 3, 1 / 3))
    assert (second["reward"], second["teacher_share"]) == pytest.approx(((-1 - 2) / 2, 1))
    assert len(as_text(rollouts, 1, tokenizer)) == 1
