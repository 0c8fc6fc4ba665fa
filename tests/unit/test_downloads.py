"""Models of the hub are fetched once and then opened from their folder, with no further question to the hub."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from data_prep import teacher_responses
from distill import rollcall
from distill.cli import main
from distill.config import Config, ModelSettings
from distill.errors import BadInput
from distill.models import downloads
from distill.models.downloads import bring, models_of, opened_at
from distill.models.loading import load_config, load_tokenizer
from distill.rollcall import RollCall

HUB_ID = "some/student"


class Roll(RollCall):
    """That of one rank alone, with the turn to fetch or without; keeps what hosts would compare."""

    def __init__(self, turn: bool = True) -> None:
        self.turn, self.compared = turn, {}

    def together(self, work: Callable, patience: object = None) -> Any:
        return work()

    def in_turn(self, work: Callable, patience: object = None) -> None:
        if self.turn:
            work()

    def compare(self, facts: dict) -> None:
        self.compared = facts


@pytest.fixture
def config(tmp_path: Path, records_dir: Path) -> Config:
    raw: dict[str, Any] = {
        "run": {"folder": str(tmp_path / "run")},
        "student": {"path": HUB_ID},
        "teacher": {"path": str(records_dir)},
        "data": {"train": str(records_dir / "train")},
        "objective": {"name": "kd"},
        "optim": {"steps": 2},
    }
    return Config.model_validate(raw)


@pytest.fixture
def hub(models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """A hub with one model, revision `abc123`; the list holds each call: what for, and whether only locally."""
    calls: list[tuple[str, bool]] = []
    cached = tmp_path / "snapshots" / "abc123"

    def download(repo_id: str, local_files_only: bool = False, **patterns: list[str]) -> str:
        calls.append((repo_id, local_files_only))
        if repo_id != HUB_ID:
            raise OSError(f"404: no {repo_id}\nmore")
        if not local_files_only:
            shutil.copytree(models_dir / "student", cached, dirs_exist_ok=True)
        assert cached.exists()
        return str(cached)

    monkeypatch.setattr(downloads, "snapshot_download", download)
    monkeypatch.setattr(downloads, "_folders", {})
    return calls


def test_fetched_models_are_opened_from_their_folder(hub: list, config: Config) -> None:
    roll = Roll()
    bring(models_of(config), roll)
    assert hub == [(HUB_ID, False), (HUB_ID, True)], "a folder is not asked for"
    assert roll.compared == {"student.path": "abc123"}
    assert opened_at(HUB_ID).endswith("abc123")
    assert load_config(ModelSettings(path=HUB_ID), "student.path").model_type == "llama"
    assert len(load_tokenizer(HUB_ID, "student.path")) == 600
    assert opened_at("other/model") == "other/model"


def test_weights_come_once_and_whole() -> None:
    sharded = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    again = ["pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "onnx/config.json"]
    patterns = {"allow_patterns": downloads._NEEDED, "ignore_patterns": downloads._TWICE}
    assert list(filter_repo_objects([*sharded, *again], **patterns)) == sharded


def test_a_model_that_the_hub_does_not_give_is_named(hub: list, config: Config) -> None:
    other = config.model_copy(update={"student": ModelSettings(path="no/such")})
    with pytest.raises(BadInput, match=r"student.path = 'no/such': not fetched from the hub \(404: no no/such\)"):
        bring(models_of(other), Roll())


def test_only_the_rank_whose_turn_it_is_asks_the_hub(hub: list, config: Config) -> None:
    """Any other opens what lies there."""
    bring(models_of(config), Roll())
    hub.clear()
    bring(models_of(config), Roll(turn=False))
    assert hub == [(HUB_ID, True)]


@pytest.mark.parametrize("command", ["evaluate", "teacher_responses"])
def test_every_command_brings_its_models(command: str, hub: list, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rollcall, "assemble", Roll)
    monkeypatch.setattr(teacher_responses, "assemble", Roll)
    prompts = tmp_path / "empty.jsonl"
    prompts.write_text("")
    arguments = ["--teacher", HUB_ID, "--data", str(prompts), "--out", str(tmp_path / "out")]
    if command == "evaluate":
        suite = tmp_path / "suite.yaml"
        suite.write_text(f"teacher: {{path: {HUB_ID}}}\nsets: {{s: {prompts}}}\n")
        out = str(tmp_path / "out")
        assert main(["evaluate", "--suite", str(suite), "--model", "cut=no/such", "--out", out]) == 2
        assert hub == [(HUB_ID, False), ("no/such", False)]
    else:
        monkeypatch.setattr(sys, "argv", ["teacher_responses", *arguments])
        assert teacher_responses.main() == 2
        assert hub == [(HUB_ID, False), (HUB_ID, True)]


@pytest.mark.parametrize("allowed", [False, True])
def test_pickles_of_the_hub_come_only_where_they_are_allowed(
    allowed: bool, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, cached = Path(shutil.copytree(models_dir / "student", tmp_path / "remote")), tmp_path / "cached"
    (remote / "model.safetensors").rename(remote / "pytorch_model.bin")
    cached.mkdir()

    def download(repo_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [path.name for path in remote.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(remote / name, cached)
        return str(cached)

    monkeypatch.setattr(downloads, "snapshot_download", download)
    wanted = {"student.path": ModelSettings(path=HUB_ID, allow_pickle=allowed)}
    if allowed:
        downloads.fetch(wanted)
    else:
        with pytest.raises(BadInput, match=r"no safetensors of it; take another, or give student\.allow_pickle"):
            downloads.fetch(wanted)
    assert (cached / "pytorch_model.bin").exists() == allowed
