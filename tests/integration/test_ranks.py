"""Real DeepSpeed ranks: the number of ranks, the ZeRO stage and the micro-batch split do not change the numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_llama
from safetensors.torch import load_file
from transformers import AutoTokenizer

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
    "loss/skew_kl",
    "loss/skew_rkl",
)


@pytest.fixture(scope="module")
def run_steps(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, records_dir: Path, root: Path
) -> Callable[..., tuple[dict, dict]]:
    """Two optimizer steps of MiniLLM on real ranks; figures and weights."""
    folder = tmp_path_factory.mktemp("ranks")
    config = {
        "run": {"folder": str(folder / "run"), "seed": 3},
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {"train": str(records_dir / "train"), "plain_text": str(records_dir / "text")},
        "objective": {"name": "minillm"},
        "precision": "fp32",
        "rollout": {"max_new_tokens": 12, "per_round": 16, "inner_epochs": 2, "batch": 16, "alpha": 0.3},
        "optim": {"lr": 1e-2, "batch_size": 8, "micro_batch": 4, "steps": 2, "weight_decay": 0.1},
        "parallel": {"deepspeed": str(root / "ds_configs/zero3.json")},
        "log": {"wandb": "disabled"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))

    def run(launch: Callable, name: str, *overrides: str, ranks: int) -> tuple[dict, dict]:
        out = folder / name
        launch("tests/ranks/two_steps.py", str(folder / "run.yaml"), str(out), *overrides, ranks=ranks)
        return json.loads(Path(f"{out}.json").read_text()), load_file(f"{out}.safetensors")

    return run


@pytest.fixture(scope="module")
def reference(run_steps: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Filled by the first test that needs it: one rank, one micro-batch."""
    return {}


def reference_run(reference: dict, run_steps: Callable, launch: Callable) -> tuple[dict, dict]:
    if not reference:
        reference["run"] = run_steps(launch, "one", "optim.micro_batch=8", ranks=1)
    return reference["run"]


VARIANTS = {
    "split over 4 micro-batches": (1, ["optim.micro_batch=2"]),
    "2 ranks, ZeRO-3": (2, ["optim.micro_batch=4"]),
    "2 ranks, ZeRO-3, micro-batch 1, decode batch 3": (2, ["optim.micro_batch=1", "rollout.batch=3"]),
    "4 ranks, ZeRO-3": (4, ["optim.micro_batch=2"]),
    "2 ranks, ZeRO-3, sampled layer by layer": (2, ["rollout.gather=layer"]),
    "2 ranks, ZeRO-2": (2, ["parallel.deepspeed=ds_configs/zero2.json"]),
    "2 ranks, ZeRO-1": (2, ["parallel.deepspeed=ds_configs/zero1.json"]),
    "2 ranks, ZeRO-3, activations recomputed": (2, ["student.gradient_checkpointing=true"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_layout_does_not_change_the_numbers(name: str, reference: dict, run_steps: Callable, launch: Callable) -> None:
    expected, weights = reference_run(reference, run_steps, launch)
    ranks, overrides = VARIANTS[name]
    got, got_weights = run_steps(launch, "variant", *overrides, ranks=ranks)
    assert got["sampled"] == expected["sampled"]
    assert_same(got, got_weights, expected, weights)


def assert_same(got: dict, got_weights: dict, expected: dict, weights: dict) -> None:
    """Figures of both steps and the updated weights, to fp32 rounding."""
    for ours, theirs in zip(got["figures"], expected["figures"], strict=True):
        compared = [key for key in FIGURES if key in theirs]
        assert len(compared) >= 4
        for key in compared:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-6), key
    for key, value in weights.items():
        # AdamW's first steps move by lr·sign(g): where a gradient is all rounding, its sign is too.
        close = torch.isclose(got_weights[key], value, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, key


UNTIED_LAYOUTS = {
    "2 ranks, ZeRO-3": ["optim.micro_batch=4"],
    "2 ranks, tensor-parallel head": ["parallel.student_tp=2", "parallel.teacher_tp=2", "optim.micro_batch=8"],
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


def test_an_untied_head_is_updated_alike_on_every_layout(untied: Path, run_steps: Callable, launch: Callable) -> None:
    student = f"student.path={untied}"
    expected, weights = run_steps(launch, "untied", student, "optim.micro_batch=8", ranks=1)
    before = load_file(untied / "model.safetensors")
    # About ten times what weight decay alone does.
    assert float((weights["lm_head.weight"] - before["lm_head.weight"]).abs().max()) > 8e-3
    for layout in UNTIED_LAYOUTS.values():
        got, got_weights = run_steps(launch, "untied-variant", student, *layout, ranks=2)
        assert got["sampled"] == expected["sampled"]
        assert_same(got, got_weights, expected, weights)


def test_steps_change_the_student(reference: dict, run_steps: Callable, launch: Callable, models_dir: Path) -> None:
    _, weights = reference_run(reference, run_steps, launch)
    before = load_file(models_dir / "student" / "model.safetensors")
    assert max(float((weights[name] - before[name]).abs().max()) for name in before) > 1e-3


@pytest.mark.parametrize("ranks", [2])
def test_tensor_parallel_gives_the_same_losses(
    ranks: int, reference: dict, run_steps: Callable, launch: Callable
) -> None:
    expected, weights = reference_run(reference, run_steps, launch)
    layout = ["parallel.student_tp=2", "parallel.teacher_tp=2", "optim.micro_batch=8"]
    got, got_weights = run_steps(launch, "tp", *layout, ranks=ranks)
    assert got["sampled"] == expected["sampled"]
    assert_same(got, got_weights, expected, weights)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_gathered_once(tied: bool, launch: Callable, tmp_path: Path) -> None:
    model = tiny_llama(600, 2, 0, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    launch("tests/ranks/head_gathers.py", str(tmp_path / "model"), str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    head = model.lm_head.weight.numel()
    # Before DeepSpeed knows the order of the modules: once to embed, once for all the loss's blocks.
    assert found["forward"][0].count(head) == 2
    # Afterwards it keeps what backward needs soon: every parameter once, in forward and backward together.
    assert sum(found["forward"][1] + found["backward"][1]) == sum(p.numel() for p in model.parameters())


OTHERS = {
    "kd + ce": "objective={name: kd, divergence: jsd, ce_weight: 0.5}",
    "distillm2": "objective={name: distillm2}",
}


@pytest.mark.parametrize("name", OTHERS)
def test_layout_does_not_change_other_objectives(name: str, run_steps: Callable, launch: Callable) -> None:
    common = [OTHERS[name], "data.plain_text=null"]
    expected, weights = run_steps(launch, "one", *common, "optim.micro_batch=4", ranks=1)
    got, got_weights = run_steps(launch, "two", *common, "optim.micro_batch=1", ranks=2)
    assert got["sampled"] == expected["sampled"]
    assert_same(got, got_weights, expected, weights)
