"""Runs for the comparison with the reference: pairs of models, and one run an objective with no knob at its default."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_llama, train_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PADDED = 39
"""Rows of the Llama teacher's head that are no tokens; the Qwen2 student has 7."""


def write_models(folder: Path, tokenizer: PreTrainedTokenizerBase, corpus: list[str]) -> None:
    """`NAME-student` and `NAME-teacher` for gpt2, llama and qwen2, and a teacher with a tokenizer of its own."""
    vocab = len(tokenizer)
    sizes = {"student": (2, 24, 1), "teacher": (3, 32, 2)}
    for role, (layers, width, seed) in sizes.items():
        torch.manual_seed(seed)
        is_teacher = role == "teacher"
        models = {
            "gpt2": _gpt2(vocab, layers),
            "qwen2": _qwen2(vocab + 7 * (not is_teacher), layers, width, tied=is_teacher),
        }
        models["llama"] = _llama(vocab + PADDED * is_teacher, layers, width, tied=not is_teacher)
        for family, model in models.items():
            model.save_pretrained(folder / f"{family}-{role}")
            tokenizer.save_pretrained(folder / f"{family}-{role}")
    foreign = train_tokenizer(corpus, size=400, special=["<end>"])
    foreign.save_pretrained(folder / "foreign-teacher")
    tiny_llama(len(foreign), 2, 5, initializer_range=0.1).save_pretrained(folder / "foreign-teacher")


def _gpt2(vocab: int, layers: int) -> PreTrainedModel:
    """Absolute positions, and GPT-2's usual dropout. Teacher and student are near: both may draw the same tokens."""
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=128,
        n_embd=24,
        n_layer=layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        initializer_range=0.3,
    )
    model, generator = _with_biases(GPT2LMHeadModel(config)), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (model.transformer.wte.weight, model.transformer.wpe.weight):
            own = 0.1 * parameter
            parameter.normal_(0, 0.3, generator=generator).add_(own)
        for block in model.transformer.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.mul_(0.15)
                layer.bias.mul_(0.15)
        model.transformer.ln_f.bias.mul_(0.15)
    return model


def _llama(vocab: int, layers: int, width: int, tied: bool) -> PreTrainedModel:
    """Two query heads for each key."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def _qwen2(vocab: int, layers: int, width: int, tied: bool) -> PreTrainedModel:
    """Biases in the attention's projections."""
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.3,
    )
    return _with_biases(Qwen2ForCausalLM(config))


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Biases start at zero, where a wrong one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


OPTIM = {
    "lr": 2.0e-3,
    "warmup_steps": 2,
    "betas": [0.7, 0.9],
    "weight_decay": 0.1,
    "clip_norm": 0.05,
    "batch_size": 8,
}
ROLLOUT = {
    "alpha": 0.3,
    "coins": "shared",
    "temperature": 1.7,
    "top_k": 0,
    "top_p": 1.0,
    "max_new_tokens": 9,
    # A sixth of the vocabulary: some responses end at their first token, some at the limit.
    "stop_ids": list(range(100, 200)),
    "batch": 5,
    "per_round": 16,
    "samples_per_prompt": 2,
    "inner_epochs": 2,
}
MINILLM = {
    "name": "minillm",
    "first_reward": "current",
    "gamma": 0.8,
    "whitening": "tokens",
    "reward_scale": 0.7,
    "reward_clip": 3.0,
    "weighted_single_step": False,
    "lm_soft_weight": 0.3,
    "lm_coef": 0.3,
    "length_normalised": True,
    "single_step": True,
    "ratio_clip": 0.1,
}
PAPER = {
    "preset": "paper",
    "first_reward": "next",
    "gamma": 1.0,
    "whitening": "none",
    "reward_scale": 1.0,
    "reward_clip": None,
    "weighted_single_step": True,
    "lm_soft_weight": 0.0,
}
LMOPS = {
    "preset": "lmops",
    "first_reward": "current",
    "gamma": 0.95,
    "whitening": "padded_micro_batch",
    "reward_scale": 0.5,
    "reward_clip": 100.0,
    "weighted_single_step": False,
    "lm_soft_weight": 0.5,
}

# Name → family, objective, and what else differs: steps, schedule, other sections.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "minillm-gpt2": (
        "gpt2",
        MINILLM,
        {"steps": 6, "schedule": "cosine", "rollout": {"coins": "per_row", "top_k": 4, "top_p": 0.8}, "text": True},
    ),
    "minillm-paper": ("llama", MINILLM | PAPER, {"steps": 3, "schedule": "linear", "text": True, "valid": "rouge_l"}),
    "minillm-lmops": ("qwen2", MINILLM | LMOPS, {"steps": 3, "schedule": "linear", "rollout": {"top_p": 0.8}}),
    "opd": (
        "gpt2",
        {"name": "opd", "reward_clip": 2.0, "ratio_clip": 0.1},
        {"steps": 3, "schedule": "cosine", "valid": "reverse_kl", "rollout": {"coins": "per_row"}},
    ),
    "sft": ("gpt2", {"name": "sft"}, {"steps": 4, "schedule": "cosine", "valid": "loss"}),
    "seqkd": ("qwen2", {"name": "seqkd"}, {"steps": 3, "schedule": "linear"}),
    "kd-jsd": (
        "llama",
        {"name": "kd", "divergence": "jsd", "beta": 0.3, "temperature": 2.0, "ce_weight": 0.4, "on_policy": 0.5},
        {"steps": 6, "schedule": "linear"},
    ),
    "kd-akl": (
        "qwen2",
        {"name": "kd", "divergence": "akl", "mu": 0.3, "temperature": 0.5, "ce_weight": 0.2},
        {"steps": 3, "schedule": "constant"},
    ),
    "kd-tvd": ("gpt2", {"name": "kd", "divergence": "tvd", "temperature": 2.0}, {"steps": 3, "schedule": "linear"}),
    "gkd": (
        "qwen2",
        {"name": "gkd", "beta": 0.8, "temperature": 1.5, "on_policy": 0.6},
        {"steps": 5, "schedule": "cosine"},
    ),
    "distillm": (
        "llama",
        {
            "name": "distillm",
            "divergence": "skew_kl",
            "alpha": 0.3,
            "start": 0.4,
            "increase": 0.3,
            "tolerance": 0.0,
            "adapt_every": 2,
            "replay": 16,
        },
        {"steps": 8, "schedule": "linear", "valid": "rouge_l", "rollout": {"per_round": None, "inner_epochs": None}},
    ),
    "distillm2": ("qwen2", {"name": "distillm2", "alpha": 0.3, "beta": 0.6}, {"steps": 5, "schedule": "linear"}),
    "taid": (
        "llama",
        {"name": "taid", "start": 0.2, "end": 0.7, "momentum": 0.5, "step_size": 0.4, "on_policy": 0.3},
        {"steps": 5, "schedule": "cosine"},
    ),
    "sft-bf16": ("llama", {"name": "sft"}, {"steps": 3, "schedule": "linear", "precision": "bf16"}),
    "kd-bf16": (
        "qwen2",
        {"name": "kd", "divergence": "reverse_kl", "temperature": 1.5, "ce_weight": 0.3},
        {"steps": 3, "schedule": "linear", "precision": "bf16"},
    ),
    "uld": (
        "qwen2",
        {"name": "uld", "ce_weight": 0.3, "on_policy": 0.5},
        {"steps": 4, "schedule": "linear", "teacher": "foreign", "rollout": {"alpha": 0.0}},
    ),
}
NEEDS_NO_TEACHER = ("sft", "seqkd")


def config_of(name: str, models: Path, records: Path, folder: Path, micro_batch: int) -> dict[str, Any]:
    """The whole config of a run."""
    family, objective, special = RUNS[name]
    samples = objective["name"] in ("minillm", "opd", "distillm", "distillm2") or objective.get("on_policy", 0) > 0
    config: dict[str, Any] = {
        "run": {"folder": str(folder), "seed": 11},
        "student": {"path": str(models / f"{family}-student")},
        "teacher": {"path": str(models / f"{special.get('teacher', family)}-teacher")},
        "data": {"train": str(records / "train")},
        "objective": objective,
        "precision": special.get("precision", "fp32"),
        # Left on where every step has rollouts: there the program itself must do without.
        "optim": OPTIM
        | {"steps": special["steps"], "schedule": special["schedule"], "micro_batch": micro_batch}
        | {"dropout": objective["name"] in ("minillm", "opd")},
        "evaluation": {"every": 2, "prompts": 5, "seeds": 2, "metric": special.get("valid", "auto")},
        "checkpoint": {"every": 100},
        "log": {"wandb": "disabled"},
    }
    given = ROLLOUT | special.get("rollout", {})
    config["rollout"] = {key: value for key, value in given.items() if value is not None} if samples else {}
    if "valid" in special:
        config["data"]["valid"] = str(records / "valid")
    if objective["name"] in NEEDS_NO_TEACHER:
        del config["teacher"]
    if objective["name"] == "seqkd":
        config["data"]["train"] = str(records / "written")
    if "text" in special:
        config["data"]["plain_text"] = str(records / "text")
    return config
