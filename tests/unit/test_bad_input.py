"""Whatever is given: one clear line a mistake, exit code 2, no traceback, and nothing left behind."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_inputs import CASES, Case, Place

from data_prep import preprocess
from data_prep.teacher_responses import read_files
from distill import cli
from distill.errors import EXIT_BAD_INPUT, BadInput
from distill.launching import __main__ as launching
from tools import dashboard, import_gguf, inspect_rollouts, report, shrink_model

COMMANDS: dict[str, Callable[[], int]] = {
    "distill": cli.main,
    "preprocess": preprocess.main,
    "launch": lambda: launching.main(sys.argv[1:]),
    "report": report.main,
    "import_gguf": import_gguf.main,
    "shrink_model": shrink_model.main,
    "inspect_rollouts": inspect_rollouts.main,
    "dashboard": dashboard.main,
}


@pytest.fixture
def place(good: dict, models_dir: Path, records_dir: Path, root: Path, tmp_path: Path) -> Place:
    (tmp_path / "given").mkdir()
    (tmp_path / "work").mkdir()
    good["run"]["folder"] = str(tmp_path / "work/run")
    good["parallel"] = {"deepspeed": str(root / "ds_configs/zero3.json")}
    return Place(tmp_path / "given", tmp_path / "work", good, models_dir, records_dir)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below: files with their bytes, folders and links without."""
    return {
        str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_gets_its_message_and_leaves_nothing_behind(
    case: Case, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = case.command(place)
    monkeypatch.chdir(place.work)
    monkeypatch.setattr(sys, "argv", command)
    before = contents(place.given)
    try:
        code = COMMANDS[command[0]]()
    except SystemExit as leaving:  # argparse's way
        code = leaving.code
    said = capsys.readouterr().err
    expected = case.expected.replace("GIVEN", str(place.given)).replace("WORK", str(place.work))
    assert expected in said
    assert code == EXIT_BAD_INPUT
    assert "Traceback" not in said
    assert contents(place.given) == before
    assert contents(place.work) == {}


def test_what_the_cases_change_is_good(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a case could pass for another reason than its own."""
    monkeypatch.chdir(place.work)
    copies = place.doctor(data__train=str(place.copied()), student__path=str(place.model()))
    for command in (place.doctor(), copies, place.deepspeed('{"zero_optimization": {"stage": 3}}')):
        assert cli.main(command[1:]) == 0
    assert contents(place.work) == {}


def test_a_run_folder_that_root_alone_could_write_to(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cli.main(place.doctor()[1:]) == EXIT_BAD_INPUT
    assert f"{place.work} is not writable; change its rights or name another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "DATA = 'PATH:1': not valid JSON at column 2"),
        (b'{"instruction": "caf\xe9"}', "DATA = 'PATH:1': not UTF-8"),
        (b'{"instruction": "\\ud83d"}', "DATA = 'PATH:1': holds half a surrogate pair"),
        (b'{"output": "x"}', "--data = 'PATH:1': needs 'instruction'"),
        (b"\n\n", "--data = 'PATH': holds blank lines only"),
        (b"\x1f\x8bx", "--data = 'PATH': is gzip, no text"),
    ],
)
def test_the_teacher_is_asked_nothing_malformed(content: bytes, expected: str, place: Place) -> None:
    path = place.file("a.jsonl", content)
    asked = argparse.Namespace(teacher=str(place.models / "teacher"), template="chat", data=[str(path)], max_prompt=64)
    asked.greedy_data, asked.out = None, place.work / "out"
    with pytest.raises(BadInput) as caught:
        read_files(asked)
    assert expected.replace("PATH", str(path)) in str(caught.value)
    assert contents(place.work) == {}


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 60
