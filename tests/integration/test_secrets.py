"""What a run leaves behind holds no key, no token and no password, and has the rights that the umask says."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe
from distill import cli
from tools import report

pytestmark = pytest.mark.slow

UMASK = 0o027
MARKER = "5ecr3tmark"
KEYS = {
    "WANDB_API_KEY": f"{MARKER}0123456789abcdef0123456789abcdef",
    "HF_TOKEN": f"hf_{MARKER}",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{MARKER}",
    "AWS_SECRET_ACCESS_KEY": MARKER,
    "HTTPS_PROXY": f"http://user:{MARKER}@127.0.0.1:9",
    "https_proxy": f"http://user:{MARKER}@127.0.0.1:9",
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A user's own, whose remote has a token in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README").write_text("mine")
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org"]
    remote = f"https://me:{MARKER}@example.org/mine.git"
    for words in (["init", "-q"], ["remote", "add", "origin", remote], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    (folder / "README").write_text("changed")
    return folder


@pytest.fixture
def recipe(models_dir: Path, records_dir: Path, root: Path, tmp_path: Path) -> Path:
    config: dict[str, Any] = {
        "run": {"folder": str(tmp_path / "out/run")},
        "student": {"path": str(models_dir / "student")},
        "data": {"train": str(records_dir / "train"), "valid": str(records_dir / "valid")},
        "objective": {"name": "sft"},
        "precision": "fp32",
        "optim": {"steps": 1, "batch_size": 2, "micro_batch": 2},
        "parallel": {"deepspeed": str(root / "ds_configs/zero1.json")},
        "evaluation": {"prompts": 2},
        "log": {"wandb": "offline"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def leaking(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if MARKER in path.name or (path.is_file() and MARKER.encode() in path.read_bytes()):
            yield str(path)


def with_other_rights(folder: Path, umask: int) -> Iterator[str]:
    """What has other rights to read and write than a file or folder that is simply made, or any that umask takes."""
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink() and (mode & 0o666 != 0o666 & ~umask or mode & umask):
            yield f"{path}: {mode:o}"


@pytest.fixture
def masked() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


def test_nothing_secret_is_kept_and_all_has_the_users_rights(
    recipe: Path,
    repository: Path,
    root: Path,
    models_dir: Path,
    environment: dict[str, str],
    masked: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out, run = tmp_path / "out", tmp_path / "out/run"
    done = subprocess.run(
        [sys.executable, "-m", "distill", "train", "--config", str(recipe)],
        cwd=repository,
        env=environment | KEYS | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a.jsonl").write_text('{"instruction": "Why?", "output": "So."}\n')
    preprocess(
        [str(tmp_path / "a.jsonl")], out / "records", Recipe(str(models_dir / "student"), "chat", 40, 60), workers=1
    )
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--out", str(out / "report.html")])
    assert report.main() == 0
    assert cli.main(["export", "--run", str(run), "--out", str(out / "student")]) == 0

    printed = capsys.readouterr()
    assert MARKER not in done.stdout + done.stderr + printed.out + printed.err
    (recorded,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"example.org/mine.git" in recorded.read_bytes(), "wandb notes the remote, and in plain bytes"
    assert list(leaking(out)) == []
    assert list(with_other_rights(out, UMASK)) == []


def test_the_searches_find_what_they_look_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"x{MARKER}x")
    (tmp_path / MARKER).mkdir(mode=0o700)
    (tmp_path / "a").chmod(0o666)
    assert sorted(leaking(tmp_path)) == [str(tmp_path / MARKER), str(tmp_path / "a")]
    assert len(list(with_other_rights(tmp_path, UMASK))) == 3
