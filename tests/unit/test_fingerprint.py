"""The fingerprint tells hosts apart by what would change a run, and by nothing else."""

from pathlib import Path
from typing import Any

import pytest

from distill.config import Config
from distill.fingerprint import fingerprint


@pytest.fixture
def config(models_dir: Path, records_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {"folder": str(tmp_path / "run")},
        "student": {"path": str(models_dir / "student")},
        "data": {"train": str(records_dir / "train")},
        "objective": {"name": "sft"},
        "optim": {"steps": 2},
    }


def facts(config: dict[str, Any]) -> dict[str, str]:
    return fingerprint(Config.model_validate(config))


def test_it_is_the_same_twice(config: dict) -> None:
    assert facts(config) == facts(config)
    assert {"python", "torch", "distill/rollcall.py", "the settings", "data.train", "student.path"} <= facts(
        config
    ).keys()


def test_a_changed_setting_shows(config: dict) -> None:
    changed = facts(config | {"optim": {"steps": 3}})
    assert [name for name, value in facts(config).items() if changed[name] != value] == ["the settings"]


def test_a_run_folder_that_is_not_shared_shows(config: dict, tmp_path: Path) -> None:
    before = facts(config)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest").write_text("step-3")
    changed = {name for name, value in facts(config).items() if before[name] != value}
    assert changed == {"the latest checkpoint in run.folder"}


def test_other_records_show_and_a_hub_id_is_left_out(config: dict, records_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "train"
    copy.mkdir()
    for file in (records_dir / "train").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    before = facts(config | {"data": {"train": str(copy)}})
    (copy / "one-more").write_text("x")
    after = facts(config | {"data": {"train": str(copy)}})
    assert [name for name, value in before.items() if after[name] != value] == ["data.train"]
    (copy / "one-more").write_text("y")
    assert facts(config | {"data": {"train": str(copy)}})["data.train"] != after["data.train"], "as long, but another"
    assert "student.path" not in facts(config | {"student": {"path": "some/model"}})
