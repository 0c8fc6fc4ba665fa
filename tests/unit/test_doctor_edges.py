"""Checks of the doctor at the edge: the last value that passes, and the first that does not."""

import json
from pathlib import Path

import datasets
import pytest
from run_configs import change, problems
from transformers import LlamaConfig, PreTrainedTokenizerFast

from distill.checks.contents import largest_id, wrong_contents
from distill.checks.layout import check_batches
from distill.checks.report import Report
from distill.config import Config
from distill.data.records import open_records, read_manifest
from distill.models.vocabulary import KnownIds, shared_vocabulary


@pytest.mark.parametrize(("tokens", "refused"), [(192, False), (193, True)])
def test_a_sequence_may_fill_the_context(tokens: int, refused: bool, good: dict) -> None:
    """Of 256 tokens; prompts have up to 64."""
    found = problems(change(good, "rollout.max_new_tokens", tokens))
    assert any("sequences may reach 257 tokens" in line for line in found) == refused
    assert bool(found) == refused


def test_the_first_id_beyond_the_rows_is_beyond() -> None:
    known = KnownIds(600, "told")
    assert known.beyond([[0, 599], [], [598]]) is None
    assert known.beyond([[0], [600, 3], [601]]) == 601
    assert known.beyond([[600]]) == 600


@pytest.mark.parametrize(("rows", "shared"), [((640, 700), 600), ((640, 500), 500), ((600,), 600), ((), 600)])
def test_ids_are_shared_that_every_model_and_the_tokenizer_know(
    rows: tuple[int, ...], shared: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert shared_vocabulary(tokenizer, *(LlamaConfig(vocab_size=size) for size in rows)) == shared


def test_the_first_id_that_the_tokenizer_has_not_is_wrong(records_dir: Path) -> None:
    rows, manifest = open_records(records_dir / "train", "instructions", "x"), read_manifest(records_dir / "train", "x")
    most = max(index for row in rows for index in (*row["prompt_ids"], *row["response_ids"]))
    assert wrong_contents(rows, manifest, most + 1) is None
    wrong = wrong_contents(rows, manifest, most)
    assert wrong is not None
    assert wrong.endswith(f" holds the id {most}, the tokenizer has 0 to {most - 1}")


def test_every_part_of_the_records_is_looked_through() -> None:
    """Records are mapped file by file."""
    parts = [datasets.Dataset.from_dict({"ids": rows}) for rows in ([[3], [4, 1]], [[2]], [[9], []])]
    assert largest_id(datasets.concatenate_datasets(parts), "ids") == 9


@pytest.mark.parametrize(("ranks", "refused"), [(4, False), (8, True)])
def test_ranks_that_share_a_student_take_the_same_rows(ranks: int, refused: bool, good: dict) -> None:
    """8 sequences over 2 replicas of 2 ranks are micro-batches of 4; over 4 they are of 2."""
    config = change(good, "optim.micro_batch", 4) | {"parallel": {"student_tp": 2, "teacher_tp": 2}}
    report = Report()
    check_batches(Config.model_validate(config), ranks, report)
    assert [problem.field for problem in report.problems] == (["optim.micro_batch"] if refused else [])


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, ".offload_optimizer.device = 'nvme'"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, ".offload_param.device = 'nvme'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, ".offload_optimizer.ratio = 0.5"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, ".offload_optimizer.super_offload = True"),
    ],
)
def test_state_that_no_checkpoint_would_find_is_refused(zero: dict, expected: str, good: dict, tmp_path: Path) -> None:
    found = _said_of(zero, good, tmp_path)
    assert [line for line in found if line.startswith(f"zero_optimization{expected}: ")]
    assert all("a run could not be resumed" in line for line in found), found


def test_bad_numbers_must_be_seen(good: dict, tmp_path: Path) -> None:
    assert _said_of({"stage": 2, "compute_grad_norm": True}, good, tmp_path) == []
    (line,) = _said_of({"stage": 2, "compute_grad_norm": False}, good, tmp_path)
    assert line.startswith("zero_optimization.compute_grad_norm = False: ")
    assert line.endswith("steps that are not finite are seen by it; leave it out")


def _said_of(zero: dict, good: dict, folder: Path) -> list[str]:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3} | zero}))
    return problems(good | {"parallel": {"deepspeed": str(path)}})
