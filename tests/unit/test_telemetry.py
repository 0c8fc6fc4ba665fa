"""What is logged, and where."""

from pathlib import Path

import pytest

from distill.config import Config
from distill.telemetry import METRICS, Telemetry


def test_a_wandb_that_is_gone_costs_no_run(good: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """Who ends a launch may end its process first."""

    class Gone:
        def log(self, metrics: dict, step: int) -> None:
            raise ConnectionResetError("Connection lost")

    Path(good["run"]["folder"]).mkdir()
    telemetry = Telemetry(Config.model_validate(good | {"log": {"wandb": "disabled"}}), True, 0)
    telemetry._wandb = Gone()
    for step in (1, 2):
        telemetry.log(step, {"loss/total": 1.0})
    telemetry.close()
    said = capsys.readouterr().err
    assert said.count("distill: wandb is lost (ConnectionResetError: Connection lost); metrics.jsonl has every") == 1
    assert len((Path(good["run"]["folder"]) / METRICS).read_text().splitlines()) == 2
