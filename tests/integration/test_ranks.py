"""Real DeepSpeed ranks: the number of ranks, the ZeRO stage and the micro-batch split do not change the numbers.

One rank and two under ZeRO-3 are held against an independent reference in test_reference_runs.py; other layouts here.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

FIGURES = (
    "loss/total",
    "loss/long",
    "loss/single",
    "loss/lm",
    "student/reverse_kl",
    "optim/grad_norm",
    "loss/jsd",
    "loss/ce",
    "loss/uld",
    "loss/sft",
    "loss/skew_kl",
    "loss/skew_rkl",
    "rollout/distinct_4",
)


KD, DISTILLM2 = "objective={name: kd, divergence: jsd, ce_weight: 0.5}", "objective={name: distillm2}"
SFT = "objective={name: sft}"
ULD = ["objective={name: uld, on_policy: 0.5}", "rollout.alpha=0.0", "data.plain_text=null"]
NO_TEXT = "data.plain_text=null"
UNTIED, PADDED = "student.path={untied}", "teacher.path={padded}"
SHARDED = ["parallel.student_tp=2", "parallel.teacher_tp=2"]
SHARDED_TEACHER = ["parallel.teacher_tp=2"]

# Name → ranks and overrides. One rank with one micro-batch is what the others are held against.
REFERENCES = {
    "minillm": (1, ["optim.micro_batch=8"]),
    "untied": (1, ["optim.micro_batch=8", UNTIED]),
    "padded": (1, ["optim.micro_batch=4", KD, NO_TEXT, PADDED]),
    "uld": (1, [*ULD, "optim.micro_batch=4"]),
    "sft": (1, ["optim.micro_batch=8", SFT, NO_TEXT]),
    "kd": (1, ["optim.micro_batch=4", KD, NO_TEXT]),
    "distillm2": (1, ["optim.micro_batch=4", DISTILLM2, NO_TEXT]),
}
# Name → what it must equal, ranks and overrides.
VARIANTS = {
    "2 ranks, micro-batch 1, decode batch 3": ("minillm", 2, ["optim.micro_batch=1", "rollout.batch=3"]),
    "2 ranks, sampled layer by layer": ("minillm", 2, ["rollout.gather=layer"]),
    "2 ranks, activations recomputed": ("minillm", 2, ["student.gradient_checkpointing=true"]),
    "2 ranks, ZeRO-0": ("minillm", 2, ["parallel.deepspeed={zero0}"]),
    "2 ranks, ZeRO-1": ("minillm", 2, ["parallel.deepspeed=ds_configs/zero1.json"]),
    "2 ranks, ZeRO-2": ("minillm", 2, ["parallel.deepspeed=ds_configs/zero2.json"]),
    "2 ranks, ZeRO-3 in host memory": ("minillm", 2, ["parallel.deepspeed=ds_configs/zero3_offload.json"]),
    "4 ranks": ("minillm", 4, ["optim.micro_batch=2"]),
    "4 ranks, sft": ("sft", 4, ["optim.micro_batch=2", SFT, NO_TEXT]),
    "4 ranks, kd": ("kd", 4, ["optim.micro_batch=2", KD, NO_TEXT]),
    "TP 2": ("minillm", 2, [*SHARDED, "optim.micro_batch=8"]),
    "TP 2, untied head": ("untied", 2, [*SHARDED, UNTIED, "optim.micro_batch=8"]),
    "TP 2, sft": ("sft", 2, [*SHARDED, SFT, NO_TEXT, "optim.micro_batch=4"]),
    "TP 2, kd": ("kd", 2, [*SHARDED, KD, NO_TEXT, "optim.micro_batch=4"]),
    "TP 2, teacher's head padded": ("padded", 2, [*SHARDED, KD, NO_TEXT, PADDED, "optim.micro_batch=4"]),
    "TP 2, distillm2": ("distillm2", 2, [*SHARDED, DISTILLM2, NO_TEXT, "optim.micro_batch=2"]),
    "teacher alone TP 2, decode batch 3": ("minillm", 2, [*SHARDED_TEACHER, "optim.micro_batch=4", "rollout.batch=3"]),
    "teacher alone TP 2, kd": ("kd", 2, [*SHARDED_TEACHER, KD, NO_TEXT, "optim.micro_batch=1"]),
    "teacher alone TP 2, distillm2": ("distillm2", 2, [*SHARDED_TEACHER, DISTILLM2, NO_TEXT, "optim.micro_batch=1"]),
    "teacher alone TP 2, uld": ("uld", 2, [*ULD, *SHARDED_TEACHER, "optim.micro_batch=2"]),
    "TP 2 × DP 2": ("minillm", 4, [*SHARDED, "optim.micro_batch=2"]),
    "TP 2 × DP 2, sft": ("sft", 4, [*SHARDED, SFT, NO_TEXT, "optim.micro_batch=2"]),
    "TP 2 × DP 2, kd": ("kd", 4, [*SHARDED, KD, NO_TEXT, "optim.micro_batch=2"]),
    "teacher alone TP 2, 4 ranks": ("minillm", 4, [*SHARDED_TEACHER, "optim.micro_batch=2"]),
    "TP 2, its own DeepSpeed settings": (
        "minillm",
        2,
        [*SHARDED, "optim.micro_batch=8", "parallel.deepspeed=ds_configs/zero3_tp.json"],
    ),
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """A student whose head is a weight of its own."""
    folder = tmp_path_factory.mktemp("untied")
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "student")
    tokenizer.save_pretrained(folder)
    model = tiny_llama(len(tokenizer), 2, seed=1, initializer_range=0.1, tie_word_embeddings=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """The teacher with rows in its head that are no tokens, and more than the student has."""
    folder = tmp_path_factory.mktemp("padded")
    AutoTokenizer.from_pretrained(models_dir / "teacher").save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(models_dir / "teacher")
    model.resize_token_embeddings(len(model.lm_head.weight) + 39)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def result(
    tmp_path_factory: pytest.TempPathFactory,
    models_dir: Path,
    records_dir: Path,
    untied: Path,
    padded: Path,
    root: Path,
    launch: Callable,
) -> Callable[[str], tuple[dict, dict]]:
    """Figures and weights of a run of two optimizer steps; all of one layout come from one start of the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    config = {
        "run": {"folder": str(folder / "run"), "seed": 3},
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {
            "train": str(records_dir / "train"),
            "plain_text": str(records_dir / "text"),
            "valid": str(records_dir / "valid"),
        },
        "objective": {"name": "minillm"},
        "precision": "fp32",
        "rollout": {"max_new_tokens": 12, "per_round": 16, "inner_epochs": 2, "batch": 16, "alpha": 0.3},
        "optim": {"lr": 1e-2, "batch_size": 8, "micro_batch": 4, "steps": 2, "weight_decay": 0.1},
        "parallel": {"deepspeed": str(root / "ds_configs/zero3.json")},
        "evaluation": {"prompts": 5},  # no number of ranks divides them: some are repeated, none counts twice
        "log": {"wandb": "disabled"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    every = REFERENCES | {name: variant[1:] for name, variant in VARIANTS.items()}

    def layout(name: str) -> tuple[int, list[str]]:
        return every[name][0], [text for text in every[name][1] if text in SHARDED]

    def fill(text: str) -> str:
        for name, path in (("untied", untied), ("padded", padded), ("zero0", folder / "zero0.json")):
            text = text.replace(f"{{{name}}}", str(path))
        return text

    def get(name: str) -> tuple[dict, dict]:
        if not (folder / f"{name}.json").exists():
            alike = [other for other in every if layout(other) == layout(name)]
            jobs = [
                {
                    "out": str(folder / other),
                    "overrides": [fill(text) for text in every[other][1]],
                }
                for other in alike
            ]
            (folder / "jobs.json").write_text(json.dumps(jobs))
            command = ["tests/ranks/two_steps.py", str(folder / "run.yaml"), str(folder / "jobs.json")]
            launch(*command, ranks=every[name][0])
        return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_layout_does_not_change_the_numbers(name: str, result: Callable) -> None:
    """Figures of both steps and the updated weights, to fp32 rounding."""
    (expected, weights), (got, got_weights) = result(VARIANTS[name][0]), result(name)
    assert got["sampled"] == expected["sampled"]
    for ours, theirs in zip(got["figures"], expected["figures"], strict=True):
        compared = [key for key in FIGURES if key in theirs]
        assert len(compared) >= 2
        if "loss/uld" in theirs:
            compared = [key for key in compared if key != "optim/grad_norm"]
        for key in compared:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-6), key
    assert expected["validation"].keys() & {"loss", "reverse_kl"}, "a mean over tokens"
    assert got["validation"] == pytest.approx(expected["validation"], rel=2e-4)
    if VARIANTS[name][0] == "uld":
        return  # its gradient is a sign at each place of an order, which rounding moves
    for key, value in weights.items():
        # AdamW's first steps move by lr·sign(g): where a gradient is all rounding, its sign is too.
        close = torch.isclose(got_weights[key], value, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, key


def test_every_shipped_deepspeed_config_is_among_them(root: Path) -> None:
    asked = " ".join(override for variant in VARIANTS.values() for override in variant[2])
    missing = [path.name for path in (root / "ds_configs").iterdir() if f"ds_configs/{path.name}" not in asked]
    assert missing == ["zero3.json"], "the one that all others run with"


def test_steps_change_the_student(result: Callable, models_dir: Path, untied: Path) -> None:
    for name, folder in (("minillm", models_dir / "student"), ("untied", untied)):
        _, weights = result(name)
        before = load_file(folder / "model.safetensors")
        assert max(float((weights[key] - before[key]).abs().max()) for key in before) > 1e-3
    # About ten times what weight decay alone does to it.
    assert float((weights["lm_head.weight"] - before["lm_head.weight"]).abs().max()) > 8e-3


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_gathered_once(tied: bool, launch: Callable, tmp_path: Path) -> None:
    model = tiny_llama(600, 2, 0, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    launch("tests/ranks/head_gathers.py", str(tmp_path / "model"), str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    # The first step teaches DeepSpeed the order of the modules: once to embed, once for all the loss's blocks.
    assert found["forward"][0].count(model.lm_head.weight.numel()) == 2
    # From then on it keeps what backward needs soon: every parameter once, in forward and backward together.
    for step in (1, 2):
        gathered = sum(found["forward"][step]) + sum(found["backward"][step])
        assert gathered == sum(parameter.numel() for parameter in model.parameters())
