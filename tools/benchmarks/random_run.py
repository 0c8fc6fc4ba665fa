"""A whole run of random words: models of random weights, a tokenizer of numbered words, records, a recipe."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe

_RECORDS = 64


def write_run(folder: Path, shapes: dict[str, dict[str, Any]], prompt: int, settings: dict[str, Any]) -> Path:
    """`student` and `teacher` of these shapes, records whose prompts are all of `prompt` tokens, and the recipe.

    Returns:
        The recipe's path. A model of random weights hardly ever draws EOS: responses reach their limit.
    """
    vocab = shapes["student"]["vocab_size"]
    tokenizer = _tokenizer(vocab)
    for name, shape in shapes.items():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, eos_token_id=0, bos_token_id=None, tie_word_embeddings=False)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = []
    for row in torch.randint(1, vocab, (_RECORDS, prompt), generator=torch.Generator().manual_seed(0)).tolist():
        text = " ".join(f"w{index}" for index in row)
        lines.append(json.dumps({"prompt": text, "output": text}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = Recipe(str(folder / "student"), "plain", prompt, 2 * prompt + 1)
    preprocess([str(folder / "train.jsonl")], folder / "train", recipe, workers=1)
    given = {
        "run": {"folder": str(folder / "run")},
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "data": {"train": str(folder / "train")},
        "log": {"wandb": "disabled"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(given | settings), encoding="utf-8")
    return path


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = {"<eos>": 0} | {f"w{index}": index for index in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
