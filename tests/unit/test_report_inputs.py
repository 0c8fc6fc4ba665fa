"""What a report reads: records that a kill has cut off, folders that are no run's, files that are no evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from reports import judged_folder, make_run, records, two_runs

from distill.errors import BadInput
from tools.reporting.evaluations import read_evaluation
from tools.reporting.page import page
from tools.reporting.report import Report
from tools.reporting.runs import read_run, read_runs


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    return judged_folder(tmp_path)


def test_a_torn_last_line_does_not_matter(tmp_path: Path) -> None:
    two = two_runs(tmp_path)
    before = page(Report(read_runs(two)))
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = two[1] / name
        path.write_bytes(path.read_bytes() + b'{"step": 61, "loss/total": 9, "prompt": "\xe2\x82')
    assert page(Report(read_runs(two))) == before


@pytest.mark.parametrize("line", ["7", "null", '{"step": null}', '{"step": true}', '{"step": 1e999}', "[" * 9999, ""])
def test_lines_that_are_no_record_are_left_out(tmp_path: Path, line: str) -> None:
    folder = make_run(tmp_path / "r", [{"step": 1, "loss/total": 1.0}])
    (folder / "metrics.jsonl").write_text(line + "\n" + (folder / "metrics.jsonl").read_text())
    assert read_run(folder, "r").records == [{"step": 1.0, "loss/total": 1.0}]


def test_of_two_records_of_a_step_the_later_counts(tmp_path: Path) -> None:
    run = read_run(
        make_run(tmp_path / "r", [{"step": 2, "a/b": 1.0}, {"step": 1, "a/b": 5.0}, {"step": 2, "a/b": 3}]), "r"
    )
    assert (run.curves["a/b"].steps.tolist(), run.curves["a/b"].values.tolist()) == ([1, 2], [5, 3])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / place / "run", records(2)) for place in "ab"]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]
    with pytest.raises(BadInput, match="is given twice"):
        read_runs([folders[0], folders[0]])


def test_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no metrics\.jsonl in it"):
        read_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(BadInput, match="holds no record"):
        read_runs([tmp_path])


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"figures": 3}, "figures"),
        ({"suite": {}}, "suite.sets"),
        ({"differences": [{"set": "x"}]}, "differences.0.model"),
    ],
)
def test_what_is_no_evaluation_is_named(judged: Path, change: dict[str, Any], where: str) -> None:
    path = judged / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=rf"is no evaluation \(at {where}\)"):
        read_evaluation(judged)


def test_damaged_scores_cost_the_lengths_only(judged: Path) -> None:
    path = judged / "sft/held-out.scores.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert list(read_evaluation(judged).lengths["held-out"]) == ["minillm"]


def test_a_model_s_name_leads_nowhere_else(judged: Path) -> None:
    path = judged / "evaluation.json"
    path.write_text(path.read_text().replace('"sft": {"path"', '"../judged-too/sft": {"path"'))
    (judged / "sft").rename(judged.parent / "sft")
    (judged.parent / "judged-too").mkdir()
    (judged.parent / "sft").rename(judged.parent / "judged-too/sft")
    assert list(read_evaluation(judged).lengths["held-out"]) == ["minillm"]
