"""Model surgery, stages, model card, table and config reference."""

import json
import sys
from pathlib import Path

import pytest
import torch
from reports import evaluation, figures
from tiny_models import tiny_llama

from distill.config import Config
from distill.errors import BadInput
from distill.evaluation.table import markdown_table, terminal_tables
from distill.evaluation.text import repetition, rouge_l
from distill.model_card import model_card
from tools.config_reference import with_references
from tools.shrink_model import evenly_spaced, shrink
from tools.stages import Ledger, Stage, StageFailed


@pytest.mark.parametrize(
    ("total", "keep", "kept"), [(30, 2, [0, 29]), (30, 10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]), (4, 4, [0, 1, 2, 3])]
)
def test_layers_are_evenly_spaced_with_first_and_last(total: int, keep: int, kept: list[int]) -> None:
    assert evenly_spaced(total, keep) == kept


@pytest.mark.parametrize("keep", [0, 1, 31])
def test_impossible_depths_are_refused(keep: int) -> None:
    with pytest.raises(BadInput, match="the model has 30 layers; give 2 to 30"):
        evenly_spaced(30, keep)


def test_shrunk_model_computes_with_the_kept_layers() -> None:
    model = tiny_llama(20, 5, seed=0)
    first, middle, last = (model.model.layers[index].mlp.up_proj.weight for index in (0, 2, 4))
    small = shrink(model, 3)
    kept = [layer.mlp.up_proj.weight for layer in small.model.layers]
    assert all(ours is theirs for ours, theirs in zip(kept, (first, middle, last), strict=True))
    assert small.config.num_hidden_layers == len(small.model.layers) == 3
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        cached = small.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
        plain = small.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    assert cached.tolist() == plain.tolist()


def test_stages_are_reused_until_their_commands_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stage(name: str, text: str) -> Stage:
        script = f"open({str(tmp_path / name)!r}, 'a').write({text!r})"
        return Stage(name, [[sys.executable, "-c", script]], [tmp_path / name])

    for _ in range(2):
        ledger = Ledger(tmp_path / "stages.json")
        ledger.run(stage("a", "1"))
        ledger.run(stage("b", "1"))
    assert capsys.readouterr().out.count("reused") == 2
    Ledger(tmp_path / "stages.json").run(stage("a", "2"))
    # As if killed here: b was made from the old a, and a new process must know.
    Ledger(tmp_path / "stages.json").run(stage("b", "1"))
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("2", "1")
    assert "reused" not in capsys.readouterr().out
    (tmp_path / "b").write_text("changed by hand")
    (tmp_path / "b").unlink()
    Ledger(tmp_path / "stages.json").run(stage("b", "1"))
    assert (tmp_path / "b").read_text() == "1"


def test_a_stage_sees_that_its_inputs_changed(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("1")

    def stage() -> Stage:
        return Stage("x", [[sys.executable, "-c", "pass"]], [], [tmp_path / "in"])

    before = stage().key
    assert stage().key == before
    (tmp_path / "in").write_text("2")
    assert stage().key != before


def test_a_stage_begun_anew_goes_on_after_a_kill(tmp_path: Path) -> None:
    """It ends at its third start; what each has written is there for the next."""

    def stage(text: str) -> Stage:
        script = f"""
import pathlib
path = pathlib.Path({str(tmp_path / "out")!r})
done = path.read_text() if path.exists() else ""
path.write_text(done + {text!r})
raise SystemExit(len(done) < 2)
"""
        return Stage("x", [[sys.executable, "-c", script]], [tmp_path / "out"])

    (tmp_path / "out").write_text("old")
    Ledger(tmp_path / "stages.json").run(stage("a"))
    for _ in range(2):
        with pytest.raises(StageFailed):
            Ledger(tmp_path / "stages.json").run(stage("b"))
    Ledger(tmp_path / "stages.json").run(stage("b"))
    assert (tmp_path / "out").read_text() == "bbb"
    with pytest.raises(StageFailed):
        Ledger(tmp_path / "stages.json").run(stage("c"))
    assert (tmp_path / "out").read_text() == "c"


def test_failed_stage_gives_its_exit_code_and_is_not_recorded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "stages.json")
    with pytest.raises(StageFailed) as caught:
        ledger.run(Stage("x", [[sys.executable, "-c", "raise SystemExit(3)"]], []))
    assert caught.value.code == 3
    assert "x" not in ledger.finished


def test_stages_run_together_each_with_its_share_and_its_log(tmp_path: Path) -> None:
    """Each waits for the other, so one at a time would never end."""

    def stage(name: str, other: str) -> Stage:
        script = f"""
import os, pathlib, time
folder = pathlib.Path({str(tmp_path)!r})
(folder / {name!r}).write_text(os.environ["OMP_NUM_THREADS"])
while not (folder / {other!r}).exists():
    time.sleep(0.01)
print("I am " + {name!r})
"""
        return Stage(name, [[sys.executable, "-c", script]], [tmp_path / name])

    ledger = Ledger(tmp_path / "stages.json")
    ledger.run_together([stage("a", "b"), stage("b", "a")], jobs=2)
    assert set(json.loads((tmp_path / "stages.json").read_text())) == {"a", "b"}
    assert (tmp_path / "logs/a.log").read_text() == "I am a\n"
    # One made anew leaves what stands beside it, and not what came of it.
    ledger.run(Stage("c", [[sys.executable, "-c", "pass"]], []))
    (tmp_path / "a").unlink()
    ledger.run_together([stage("a", "b"), stage("b", "a")], jobs=2)
    assert {name: stage["stale"] for name, stage in ledger.finished.items()} == {"a": False, "b": False, "c": True}


def test_of_stages_together_the_one_that_fails_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "stages.json")
    stages = [Stage(str(code), [[sys.executable, "-c", f"raise SystemExit({code})"]], []) for code in (0, 3)]
    with pytest.raises(StageFailed, match="stage '3'"):
        ledger.run_together(stages, jobs=2)
    assert "3" not in ledger.finished
    assert "0" in ledger.finished


def test_tables_hold_every_figure() -> None:
    measured = evaluation(figures(sft=(1.5, 2.5), minillm=(3.5, 4.5)))
    lines = terminal_tables(measured).splitlines()
    assert lines[0] == "held-out"
    assert lines[-1].split() == [
        "minillm",
        "3.5",
        "[3.0,",
        "4.0]",
        "4.500",
        "[4.450,",
        "4.550]",
        "20.0",
        "[19.5,",
        "20.5]",
    ]
    expected = "| sft | 1.5 [1.0, 2.0] | 2.500 [2.450, 2.550] | 20.0 [19.5, 20.5] |"
    assert markdown_table(measured, "held-out").splitlines()[2] == expected


def test_model_card_says_what_made_the_model() -> None:
    config = Config.model_validate(
        {
            "run": {"folder": "runs/x"},
            "student": {"path": "small"},
            "teacher": {"path": "big"},
            "data": {"train": "records"},
            "objective": {"name": "minillm", "preset": "paper"},
            "optim": {"steps": 3},
        }
    )
    card = model_card(config, 3, {"valid/rouge_l": 12.5})
    for fact in ("`big`", "`small`", "`records`", "minillm", "| valid/rouge_l | 12.5 |", "gamma: 1.0"):
        assert fact in card


def test_repetition_counts_repeated_four_grams() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 2, 3]) == 0
    assert repetition([7] * 7) == pytest.approx(3 / 4)


def test_rouge_l_takes_the_best_reference_and_stems() -> None:
    assert rouge_l("the cats sat", ["a dog ran off", "the cat sat"]) == pytest.approx(100)
    assert rouge_l("a b", ["a c"]) == pytest.approx(50)


def test_readme_holds_the_current_config_reference(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert with_references(text) == text, "run `make docs`"
