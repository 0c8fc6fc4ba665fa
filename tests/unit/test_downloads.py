"""Models of the hub are fetched once and then opened from their folder, with no further question to the hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from distill.config import Config, ModelSettings
from distill.errors import BadInput
from distill.models import downloads
from distill.models.downloads import fetch_models, opened_at, use_fetched
from distill.models.loading import load_config, load_tokenizer

HUB_ID = "some/student"


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
    fetch_models(config)
    assert hub == [(HUB_ID, False)], "a folder is not asked for"
    assert use_fetched(config) == {"student.path": "abc123"}
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
        fetch_models(other)
