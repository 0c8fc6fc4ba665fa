"""The runner of mutants, on a project of one file; and the shipped mutants, each of which must fit the code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import BadInput
from tools.mutation.entries import ENTRIES, check, read_entries

CODE = """def larger(a, b):
    return a if a > b else b

def smaller(a, b):
    return a if a < b else b
"""
TESTS = """import pathlib
import time
from code_under_test import larger, smaller

def test_larger():
    assert larger(1, 2) == 2

def test_smaller_ends():
    while smaller(0, 1) != 0:
        time.sleep(0.01)

def test_fails():
    assert larger(1, 2) == 1

def test_counts_its_runs():
    # This is a copy; the temporary folders are below the project's own `runs`.
    runs = next(one for one in pathlib.Path(__file__).parents if one.name == "runs")
    with (runs / "count").open("a") as log:
        log.write("run")
"""
LARGER = {"room": "sizes", "file": "code_under_test.py", "find": "a > b", "why": "the smaller one"}
MUTANTS: list[dict[str, Any]] = [
    LARGER | {"id": "sign", "replace": "a < b", "tests": ["tests/test_it.py -k larger"], "survived_before": True},
    LARGER | {"id": "unseen", "replace": "a >= b + 1e-9", "tests": ["tests/test_it.py::test_larger"]},
    LARGER | {"id": "equal", "replace": "a >= b", "equivalent": "equal ones are the same"},
    LARGER | {"id": "broken", "room": "doubt", "replace": "a < b", "tests": ["tests/test_it.py -k fails"]},
    LARGER | {"id": "none", "room": "doubt", "replace": "a < b", "tests": ["tests/test_it.py -k nothing_of_it"]},
    LARGER | {"id": "absent", "room": "doubt", "replace": "a < b", "tests": ["tests/test_that_will_come.py"]},
]


def write(project: Path, mutants: list[dict[str, Any]]) -> None:
    (project / "tests").mkdir(exist_ok=True)
    (project / "code_under_test.py").write_text(CODE)
    (project / "tests/test_it.py").write_text(TESTS)
    (project / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (project / ".gitignore").write_text("runs/\n")
    (project / ENTRIES).write_text(yaml.safe_dump({"preload": ["hypothesis", "numpy"], "mutants": mutants}))
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)


def run(project: Path, root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.mutants", "--project", str(project), "--jobs", "2", *flags]
    environment = os.environ | {"TMPDIR": str(project / "runs")}
    (project / "runs").mkdir(exist_ok=True)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def summary(project: Path) -> dict[str, Any]:
    return json.loads((project / "runs/mutants.json").read_text())


def test_what_becomes_of_each_mutant(tmp_path: Path, root: Path) -> None:
    write(tmp_path, MUTANTS)
    done = run(tmp_path, root)
    assert done.returncode == 1, done.stderr
    found = summary(tmp_path)
    assert (found["tried"], found["killed"], found["survived"], found["errors"]) == (2, 1, 1, 3)
    assert found["equivalent"] == [{"id": "equal", "reason": "equal ones are the same"}]
    assert found["killed_by"] == {"sign": "tests/test_it.py::test_larger"}
    assert [(one["id"], one["place"]) for one in found["survivors"]] == [("unseen", "code_under_test.py:2")]
    assert {room: of["errors"] for room, of in found["by_room"].items()} == {"sizes": 0, "doubt": 3}
    assert found["by_room"]["sizes"]["survived_before"] == 1
    broken = {one["name"]: one["why"] for one in found["broken"]}
    assert broken["tests/test_it.py -k fails"] == "fails without a mistake: tests/test_it.py::test_fails"
    assert broken["broken"] == "fails without a mistake: tests/test_it.py -k fails"
    assert broken["tests/test_it.py -k nothing_of_it"].startswith("the target selects no test")
    assert broken["tests/test_that_will_come.py"].startswith("pytest does not know this target")
    assert "survived: unseen (code_under_test.py:2): the smaller one" in done.stdout
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mutants.json", "mutants.jsonl"]


def test_a_second_call_goes_on(tmp_path: Path, root: Path) -> None:
    runs = tmp_path / "runs/count"
    write(tmp_path, [MUTANTS[1] | {"tests": ["tests/test_it.py -k counts"], "survives": "nobody looks"}])
    for _ in range(2):
        done = run(tmp_path, root)
        # It is explained, but one of one is more than one of twenty.
        assert (done.returncode, done.stderr) == (1, "mutants: 0 of 1 are killed, fewer than 95%\n")
        assert runs.read_text() == "run" * 2, "without the mistake and with it"
    assert run(tmp_path, root, "--fresh", "--trusted").returncode == 1
    assert runs.read_text() == "run" * 3
    code = tmp_path / "code_under_test.py"
    code.write_text(code.read_text() + "\n")
    assert run(tmp_path, root, "--trusted", "--random", "1").returncode == 0, "a sample may hold an explained survivor"
    assert runs.read_text() == "run" * 4


def test_a_test_without_end_has_noticed(tmp_path: Path, root: Path) -> None:
    endless = LARGER | {"id": "endless", "find": "a < b", "replace": "a > b", "tests": ["tests/test_it.py -k ends"]}
    write(tmp_path, [endless])
    done = run(tmp_path, root, "--grace", "1")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)["killed_by"] == {"endless": "timeout"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"find": "a >= b"}, "one.find = 'a >= b': is not in code_under_test.py; quote the code"),
        ({"find": "return a"}, "one.find = 'return a': stands 2 times in code_under_test.py; quote the code"),
        ({"replace": "a > b"}, "one.replace = 'a > b': changes nothing; write the mistake"),
        ({"replace": "a >"}, "one.replace = 'a >': makes no Python of code_under_test.py"),
        ({"file": "gone.py"}, "one.file = 'gone.py': no such file; name the file"),
        ({"tests": []}, "one.tests = []: no test is to see it; name one"),
        ({"tests": ["-k larger"]}, "one.tests = '-k larger': does not begin with a file"),
        ({"tset": "x"}, "one.tset = 'x': Extra inputs are not permitted; correct the entry"),
        ({"id": "no id"}, "no id.id = 'no id': String should match pattern"),
        ({"id": "two"}, "two = 2: entries have this id; give each its own"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = LARGER | {"replace": "a < b", "tests": ["tests/test_it.py"]}
    write(tmp_path, [good | {"id": "one"} | change, good | {"id": "two"}])
    with pytest.raises(BadInput) as error:
        check(read_entries(tmp_path / ENTRIES).mutants, tmp_path)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_the_command_names_what_does_not_fit(tmp_path: Path, root: Path) -> None:
    write(tmp_path, [MUTANTS[0] | {"find": "gone"}])
    done = run(tmp_path, root, "--check")
    assert done.returncode == 2
    assert done.stderr.startswith("distill: sign.find = 'gone': is not in code_under_test.py")


def test_the_shipped_mutants_fit_the_code(root: Path) -> None:
    mutants = read_entries(root / ENTRIES).mutants
    check(mutants, root)
    assert len(mutants) >= 160
