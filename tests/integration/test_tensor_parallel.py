"""Two real ranks that share a replica: the vocabulary dealt out between them, and every family that AutoTP splits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, OPTConfig, Qwen2Config, Qwen3Config

pytestmark = pytest.mark.slow

SHAPE = {
    "vocab_size": 101,  # uneven parts, and rows that are no tokens
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 1,
}
OPT = {"vocab_size": 101, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3-tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "opt-tied": OPTConfig(**OPT, word_embed_proj_dim=32, dropout=0.0),
    "gemma-tied": GemmaConfig(**SHAPE),
}
# Cross-entropy beside a divergence normalises the student's logits at temperature 1 once more.
ALL_REDUCES = {"kd with ce": 6}


@pytest.fixture(scope="module")
def found(launch: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks saw."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "models" / name)
    launch("tests/ranks/tensor_parallel.py", str(folder / "models"), str(folder / "out.json"))
    return json.loads((folder / "out.json").read_text())


def test_losses_of_two_parts_of_the_vocabulary_are_those_of_the_whole(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["losses"]) == 12
        for name, loss in rank["losses"].items():
            assert loss["value"] < 1e-9, name
            assert loss["gradient"] < 1e-9 < loss["size"], name


def test_losses_reduce_a_few_numbers_and_gather_no_logits(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for name, loss in rank["losses"].items():
            assert loss["calls"] == {"all_reduce": ALL_REDUCES.get(name, 3)}, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_split_in_two_is_the_whole_model(family: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        model = rank["models"][family]
        assert model["logits"] < 1e-5
        for whole, split in (model["loss"], model["norm"]):
            assert split == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("student_tp", [2, 1])
def test_a_checkpoint_continues_the_same_run(
    student_tp: int, launch: Callable, models_dir: Path, records_dir: Path, root: Path, tmp_path: Path
) -> None:
    """With validation, and the student written, before."""
    config = {
        "run": {"folder": str(tmp_path / "run"), "seed": 3},
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {"train": str(records_dir / "train"), "valid": str(records_dir / "valid")},
        "objective": {"name": "minillm"},
        "precision": "fp32",
        "rollout": {"max_new_tokens": 12, "per_round": 16, "inner_epochs": 2, "batch": 3, "alpha": 0.3},
        "optim": {"lr": 1e-3, "batch_size": 8, "micro_batch": 2, "steps": 8},
        "parallel": {"student_tp": student_tp, "teacher_tp": 2, "deepspeed": str(root / "ds_configs/zero3_tp.json")},
        "evaluation": {"every": 1, "prompts": 5},
        "checkpoint": {"every": 2},
        "log": {"wandb": "disabled"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launch("tests/ranks/resume.py", str(tmp_path / "run.yaml"), str(tmp_path / "out.json"))
    for rank in json.loads((tmp_path / "out.json").read_text()):
        assert rank["resumed_at"] == 2
        same = [name for name in rank["went_on"] if not name.startswith(("time/", "tokens/per_second"))]
        assert {name: rank["resumed"][name] for name in same} == {name: rank["went_on"][name] for name in same}
    written = load_file(tmp_path / "run" / "student" / "model.safetensors")
    plain = load_file(models_dir / "student" / "model.safetensors")
    assert {name: value.shape for name, value in written.items()} == {name: v.shape for name, v in plain.items()}
