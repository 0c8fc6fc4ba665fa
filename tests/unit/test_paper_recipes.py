"""The paper's own recipes, as far as they can be checked without its weights: shapes are the published ones."""

import re
import shutil
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from distill import cli

RECIPES = Path(__file__).resolve().parents[2] / "launch/recipes/paper"
# The tests' tokenizer ends a text with id 0.
GPT2 = GPT2Config(eos_token_id=0, architectures=["GPT2LMHeadModel"])
GPT2_XL = GPT2Config(n_embd=1600, n_layer=48, n_head=25, eos_token_id=0, architectures=["GPT2LMHeadModel"])
LLAMA_7B = LlamaConfig(architectures=["LlamaForCausalLM"])
LLAMA_13B = LlamaConfig(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    architectures=["LlamaForCausalLM"],
)
# What each recipe says it needs: GPUs, and GiB of each.
HARDWARE = {
    "gpt2-120m-init": (GPT2, None, 1, 24),
    "gpt2-120m-minillm": (GPT2, GPT2_XL, 8, 24),
    "llama-7b-init": (LLAMA_7B, None, 8, 80),
    "llama-7b-minillm": (LLAMA_7B, LLAMA_13B, 8, 80),
}


@pytest.fixture(params=HARDWARE)
def planned(request: pytest.FixtureRequest, models_dir: Path, tmp_path: Path) -> tuple[list[str], list[str]]:
    """The recipe with local models that have a shape and a tokenizer but no weights, and its hardware, as words."""
    name = request.param
    student, teacher, gpus, memory = HARDWARE[name]
    words = ["--config", str(RECIPES / f"{name}.yaml")]
    shapes: dict[str, PretrainedConfig | None] = {"student": student, "teacher": teacher}
    for role, shape in shapes.items():
        if shape is not None:
            shape.save_pretrained(tmp_path / role)
            for path in (models_dir / "student").glob("tokenizer*"):
                shutil.copy(path, tmp_path / role)
            words.append(f"{role}.path={tmp_path / role}")
    return words, ["--nodes", "1", "--gpus-per-node", str(gpus), "--gpu-memory", str(memory)]


def test_every_recipe_of_the_paper_is_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(HARDWARE)


def test_it_fits_what_the_recipe_says(planned: tuple[list[str], list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    words, hardware = planned
    assert cli.main(["plan", *words, *hardware]) == 0
    assert "fits: " in capsys.readouterr().out


def test_doctor_misses_weights_and_data_only(
    planned: tuple[list[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = planned
    assert cli.main(["doctor", *words]) == 2
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill: ")]
    assert problems
    absent = re.compile(r"distill: ((student|teacher)\.path = .*holds no weights|data\.\w+ = .*no such folder)")
    assert [line for line in problems if not absent.match(line)] == []
