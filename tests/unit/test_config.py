"""Settings: typos, presets, overrides, and every shipped recipe."""

import json
from pathlib import Path

import pytest
import yaml

from distill.config import Config, dump, load
from distill.deepspeed_settings import fill_auto, read_deepspeed_json, resolve_dtype
from distill.errors import BadInput
from distill.evaluation.suite import Suite, load_suite
from distill.objective_settings import KdSettings, MiniLLMSettings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(ROOT.glob("launch/recipes/**/*.yaml"))
SUITES = sorted(ROOT.glob("launch/suites/*.yaml"))
DS_CONFIGS = sorted(ROOT.glob("ds_configs/*.json"))
assert RECIPES
assert SUITES
assert DS_CONFIGS

MINIMAL = {
    "run": {"folder": "runs/x"},
    "student": {"path": "s"},
    "teacher": {"path": "t"},
    "data": {"train": "d"},
    "objective": {"name": "minillm"},
    "optim": {"steps": 3},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


BAD_OVERRIDES = {
    "optim.warmup=3": "optim.warmup = 3: unknown key; did you mean 'warmup_steps'?",
    "objective.gama=1": "objective.gama = 1: unknown key; did you mean 'gamma'?",
    "optmi={steps: 3}": "optmi = {'steps': 3}: unknown key; did you mean 'optim'?",
    "optim.lr=-1": "optim.lr = -1: input should be greater than 0",
    "rollout.alpha=1": "rollout.alpha = 1: input should be less than 1",
    "objective.name=minilm": "objective.name = 'minilm': unknown objective; one of 'sft', 'seqkd', 'kd',",
    "objective={name: kd, beta: 0.5}": "objective.beta = 0.5: divergence forward_kl does not read it",
    "objective={name: kd, divergence: skew_kl, alpha: 1}": "objective.alpha = 1: input should be less than 1",
    "objective={name: gkd, beta: 2}": "objective.beta = 2: input should be less than or equal to 1",
    "objective={name: kd, ce_weight: 0.5, on_policy: 1}": "objective.ce_weight = 0.5: on_policy = 1 leaves",
    "objective={name: opd, gamma: 1}": "objective.gamma = 1: unknown key",
    "objective={preset: paper}": "objective.name = None: missing",
    "objective.preset=papers": "objective.preset = 'papers': input should be 'default', 'paper' or 'lmops'",
    "run={}": "run.folder = None: missing; add it",
    "optim.lr": "override = 'optim.lr': not of the form section.key=value",
    "optim.lr=[": "optim.lr = '[': not valid YAML",
    "optim.lr.x=1": "optim.lr.x = '1': 'lr' is a value, not a section",
    "rollout.coins=sharde": "rollout.coins = 'sharde': input should be 'shared' or 'per_row'",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override_names_field_value_and_mend(recipe: Path, override: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(recipe, ["optim.lr=1e-5", override])
    assert BAD_OVERRIDES[override] in str(caught.value)


def test_a_divergence_gets_its_own_knob_and_the_resolved_copy_reads_back(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, ["objective={name: kd, divergence: skew_rkl, temperature: 2}"])
    assert isinstance(config.objective, KdSettings)
    assert (config.objective.alpha, config.objective.beta, config.objective.mu) == (0.1, None, None)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(tmp_path / "resolved.yaml") == config
    other = load(tmp_path / "resolved.yaml", ["objective.divergence=jsd", "objective.alpha=null"])
    assert isinstance(other.objective, KdSettings)
    assert other.objective.beta == 0.5


def test_all_mistakes_come_at_once(recipe: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load(recipe, ["optim.lr=-1", "optim.warmup=3"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "wrong"),
    [(None, "no such file"), ("a: [", "not valid YAML"), ("", "holds no settings"), ("- 1", "holds no settings")],
)
def test_unreadable_file(tmp_path: Path, text: str | None, wrong: str) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=wrong):
        load(path)


def test_overrides_win_and_the_resolved_copy_reads_back(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, ["optim.lr=1e-5", "rollout.alpha=0.5", "data.plain_text=text"])
    assert (config.optim.lr, config.rollout.alpha, config.data.plain_text) == (1e-5, 0.5, Path("text"))
    copy = tmp_path / "resolved.yaml"
    copy.write_text(dump(config))
    assert load(copy) == config


def test_presets_differ_as_the_specification_says() -> None:
    def knobs(preset: str) -> tuple:
        s = MiniLLMSettings.model_validate({"name": "minillm", "preset": preset})
        return (
            s.first_reward,
            s.gamma,
            s.whitening,
            s.reward_scale,
            s.reward_clip,
            s.weighted_single_step,
            s.lm_soft_weight,
        )

    assert knobs("paper") == ("next", 1.0, "none", 1.0, None, True, 0.0)
    assert knobs("lmops") == ("current", 0.95, "padded_micro_batch", 0.5, 100.0, False, 0.5)
    assert knobs("default") == ("current", 0.95, "tokens", 0.5, 100.0, False, 0.5)


def test_a_knob_given_alone_beats_its_preset() -> None:
    settings = MiniLLMSettings.model_validate({"name": "minillm", "preset": "lmops", "gamma": 1.0})
    assert (settings.gamma, settings.reward_scale) == (1.0, 0.5)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads_and_begins_with_its_command(path: Path) -> None:
    assert isinstance(load(path), Config)
    assert f"--config {path.relative_to(ROOT)}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_every_suite_loads(path: Path) -> None:
    assert isinstance(load_suite(path), Suite)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_deepspeed_config_is_filled_completely(recipe: Path, path: Path, precision: str) -> None:
    filled = fill_auto(read_deepspeed_json(path), resolve_dtype(precision), load(recipe).optim)
    assert "auto" not in json.dumps(filled)
    assert filled["bf16"]["enabled"] == (precision == "bf16")
    assert filled["fp16"]["enabled"] == (precision == "fp16")


def test_settings_the_recipe_owns_and_leftover_autos_do_not_reach_deepspeed(recipe: Path) -> None:
    borrowed = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR"},
        "tensor_parallel": {"autotp_size": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True},
    }
    filled = fill_auto(borrowed, resolve_dtype("fp32"), load(recipe).optim)
    assert not {"train_batch_size", "optimizer", "scheduler", "tensor_parallel"} & filled.keys()
    assert filled["zero_optimization"] == {"stage": 3, "overlap_comm": True}


@pytest.mark.parametrize(("text", "wrong"), [("{", "not valid JSON"), ("[1]", "not a JSON object")])
def test_bad_deepspeed_json(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=wrong):
        read_deepspeed_json(path)
