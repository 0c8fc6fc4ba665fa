"""Small real models and data, made once a session; nothing here needs the network."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, train_tokenizer
from transformers import PreTrainedTokenizerFast

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe

ROOT = Path(__file__).resolve().parent.parent
# A second thread costs tiny tensors more than it saves: minutes, where other work wants the same cores.
torch.set_num_threads(1)
CHAT = (
    "{% if messages | length > 2 %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """The text of the shipped instruction set."""
    rows = [json.loads(line) for line in (ROOT / "data_prep/demo/train.jsonl").read_text().splitlines()]
    return [f"{row['instruction']} {row['input']}".strip() for row in rows]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    fast = train_tokenizer(corpus, size=600, special=["<eos>", "<|user|>", "<|assistant|>"])
    fast.chat_template = CHAT
    return fast


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """`student` and `teacher` as Hugging Face folders of one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, layers, seed in (("student", 2, 1), ("teacher", 3, 2)):
        tiny_llama(len(tokenizer), layers, seed, initializer_range=0.1).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def records_dir(tmp_path_factory: pytest.TempPathFactory, models_dir: Path, corpus: list[str]) -> Path:
    """`train`, `valid` and `text` records. The responses repeat the prompt, so that something can be learnt."""
    folder = tmp_path_factory.mktemp("records")
    recipe = Recipe(str(models_dir / "student"), "chat", max_prompt=64, max_length=96)
    for name, texts in (("train", corpus[:64]), ("valid", corpus[64:72])):
        lines = [json.dumps({"instruction": text, "output": " ".join(text.split()[:6])}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        preprocess([str(folder / f"{name}.jsonl")], folder / name, recipe, workers=1)
    (folder / "text.txt").write_text("\n".join(corpus))
    packed = Recipe(str(models_dir / "student"), "plain", max_prompt=16, max_length=32)
    preprocess([str(folder / "text.txt")], folder / "text", packed, kind="text", workers=1)
    return folder


@pytest.fixture
def good(models_dir: Path, records_dir: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A run of which the doctor has nothing to say."""
    return {
        "run": {"folder": str(tmp_path / "run")},
        "student": {"path": str(models_dir / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {"train": str(records_dir / "train"), "valid": str(records_dir / "valid")},
        "objective": {"name": "minillm"},
        "optim": {"steps": 2, "batch_size": 8, "micro_batch": 2},
        "rollout": {"per_round": 16, "max_new_tokens": 16},
    }


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What a user's shell has, with this interpreter's commands on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return clean | {"PATH": path, "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}


Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def launch(environment: dict[str, str], free_port: Callable[[], int]) -> Launch:
    """Run a command of the DeepSpeed launcher from the checkout and give back its output."""

    def run(*arguments: str, ranks: int = 2, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
        command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment | changes, capture_output=True, text=True, timeout=400, check=False
        )
        assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return done

    return run


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    import socket

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find
