"""The studies of RESULTS.md: what they would start is accepted, and what they choose and collate is right."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.checks.objective import check_objective
from distill.checks.report import Report
from distill.config import load
from distill.evaluation.suite import load_suite
from tools.stages import Stage
from tools.studies import dolly, stories
from tools.studies.collate import collate, table
from tools.studies.endings import Response, score
from tools.studies.equal_lengths import at_equal_lengths
from tools.studies.openings import openings
from tools.studies.variants import OBJECTIVES, VARIANT_OF

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def all_of(chain: Iterator[list[Stage]]) -> list[Stage]:
    found = [stage for stages in chain for stage in stages]
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names), "a stage is known by its name"
    return found


@pytest.fixture
def of_stories(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    monkeypatch.setattr(stories, "chosen_rates", lambda: dict.fromkeys(stories.SWEPT, 3e-4))
    return all_of(stories.stages([1, 2], 1, "stories15M"))


@pytest.fixture
def of_dolly(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """As if the model lay there."""
    found = Path.glob
    there = lambda self, pattern: iter([self / "model.gguf"]) if "gguf" in pattern else found(self, pattern)  # noqa: E731
    monkeypatch.setattr(Path, "glob", there)
    return all_of(dolly.stages([1, 2], 1, Path("processed"), 3000))


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@pytest.mark.parametrize("study", ["of_stories", "of_dolly"])
def test_every_run_and_evaluation_is_accepted(study: str, request: pytest.FixtureRequest) -> None:
    commands = [command for stage in request.getfixturevalue(study) for command in stage.commands]
    trained = {}
    for command in commands:
        if "launch/train.sh" in command:
            place = command.index("--config")
            config = load(Path(command[place + 1]), command[place + 2 :])
            report = Report()
            check_objective(config, report)
            assert not report.problems
            trained[str(config.run.folder)] = config
        elif "evaluate" in command:
            place = command.index("--out")
            suite = load_suite(Path(after(command, "--suite")), command[place + 2 :])
            models = [word.partition("=")[2] for word in command if "/student" in word]
            assert {str(Path(model).parent) for model in models} <= set(trained), "made before it is measured"
            assert len(suite.sets) in (1, 3)
    assert len(trained) > 10


def test_rates_follow_the_sweep_and_variants_follow_minillm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of both KLs decides: the best of each alone is another."""

    def figures(reverse: float, forward: float) -> dict[str, dict[str, dict[str, float]]]:
        return {"openings": {"reverse_kl": {"value": reverse}, "forward_kl": {"value": forward}}}

    values = dict(
        zip(stories.RATES, (figures(0.1, 0.9), figures(0.4, 0.4), figures(0.9, 0.1), figures(1, 1)), strict=True)
    )
    sweep = tmp_path / "sweep/evaluation"
    sweep.mkdir(parents=True)
    named = {f"{name}-{rate}": found for name in stories.SWEPT for rate, found in values.items()}
    for rate, found in zip(stories.RATES, (figures(0.1, 0.1), *[figures(1, 1)] * 3), strict=True):
        named[f"minillm-{rate}"] = found
    (sweep / "evaluation.json").write_text(json.dumps({"figures": named}))
    monkeypatch.setattr(stories, "FOLDER", tmp_path)
    rates = stories.chosen_rates()
    assert rates == dict.fromkeys(stories.SWEPT, stories.RATES[1]) | {"minillm": stories.RATES[0]}
    asked = {
        stage.name: [word for word in stage.commands[0] if word.startswith("optim.lr")]
        for stage in all_of(stories.stages([1], 1, "m"))
        if stage.name.removesuffix("-1") in OBJECTIVES
    }
    assert asked.pop("jsd-1") == [f"optim.lr={stories.RATES[1]}"]
    for name in VARIANT_OF:
        assert asked[f"{name}-1"] == asked["minillm-1"] == [f"optim.lr={stories.RATES[0]}"]


def test_seeds_are_collated(tmp_path: Path) -> None:
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        (tmp_path / str(seed)).mkdir()
        estimate = {"value": value, "low": value - 1, "high": value + 1}
        content = {"figures": {"m": {"s": {"rouge_l": estimate}}}}
        (tmp_path / str(seed) / "evaluation.json").write_text(json.dumps(content))
    found = collate([tmp_path / str(seed) for seed in range(3)])["m"]["s"]["rouge_l"]
    assert found["mean"] == 3
    assert found["sd"] == pytest.approx(7**0.5)
    assert found["intervals"][2] == [5, 7]
    same = collate([tmp_path / "1"] * 2)
    assert same["m"]["s"]["rouge_l"]["sd"] is None, "the same weights in each evaluation, as the teacher's"
    assert "2.0 [1.0, 3.0]" in table(same, "s", ["rouge_l"])
    row = table(collate([tmp_path / "0"]), "s", ["rouge_l", "dist_4"]).splitlines()[2]
    assert row.startswith("| m | 1.0 [0.0, 2.0] | – |")
    assert "3.0 ± 2.6" in table(collate([tmp_path / str(seed) for seed in range(3)]), "s", ["rouge_l"])


def test_openings_do_not_overlap_and_stay_the_same() -> None:
    found = openings(4480, seed=0)
    assert len(set(found)) == 4480
    assert found == openings(4480, seed=0)
    assert not any("{" in text for text in found)


def test_the_longer_of_two_responses_is_cut_for_rouge() -> None:
    scores = at_equal_lengths(["the cat sat down", ""], ["a dog", "the cat"], [["the cat sat down"], ["the cat"]])
    assert scores[:, 0] == pytest.approx([100 * 2 / 3, 0]), "two of four words: recall 1/2, precision 1"
    assert scores[:, 1] == pytest.approx([0, 0]), "an empty response leaves nothing of the other"


def test_ends_are_scored_where_responses_end_and_where_they_go_on() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()

    def log_p(before: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([before])).logits[0, -1].log_softmax(-1)

    def end(before: list[int]) -> float:
        return log_p(before)[2].logaddexp(log_p(before)[3]).item()

    found = score(
        model, [Response([5, 6], [7, 8, 2], True), Response([9], [4, 5], False), Response([9], [3], True)], [2, 3]
    )
    assert found.end == pytest.approx([end([5, 6, 7, 8]), end([9])], rel=1e-4)
    going_on = [[[5, 6], [5, 6, 7]], [[9], [9, 4]]]
    assert found.elsewhere == pytest.approx([sum(math.exp(end(b)) for b in pair) / 2 for pair in going_on], rel=1e-4)
    cut = -(log_p([9])[4] + log_p([9, 4])[5]).item() / 2
    assert found.nll[1:] == pytest.approx([cut, -log_p([9])[3].item()], rel=1e-4)
