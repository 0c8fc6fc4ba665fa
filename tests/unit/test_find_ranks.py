"""A RANK that somebody left in the shell, without what a launcher sets beside it."""

from pathlib import Path

import pytest
import yaml

from distill import cli
from distill.errors import EXIT_BAD_INPUT

BESIDE = {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("missing", "wrong"),
    [
        (["WORLD_SIZE"], "WORLD_SIZE is not set"),
        (["MASTER_ADDR"], "MASTER_ADDR is not set"),
        (["MASTER_PORT"], "MASTER_PORT is not set"),
        (["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"], "WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not set"),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_rank_without_the_rest_is_one_line(
    verb: str,
    missing: list[str],
    wrong: str,
    good: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in BESIDE.items():
        monkeypatch.setenv(name, value)
        if name in missing:
            monkeypatch.delenv(name)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(good))
    (tmp_path / "suite.yaml").write_text("sets: {s: t.jsonl}")
    evaluation = ["--suite", str(tmp_path / "suite.yaml"), "--model", "a=x", "--out", str(tmp_path / "out")]
    arguments = {"train": ["--config", str(tmp_path / "run.yaml")], "evaluate": evaluation}[verb]
    assert cli.main([verb, *arguments]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"distill: RANK = '0': {wrong}; unset RANK, or start through a launcher\n"
