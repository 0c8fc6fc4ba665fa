"""What DeepSpeed is told: the user's JSON with every `auto` filled from the run's settings, and the precision."""

import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from distill.config import OptimSettings
from distill.errors import BadInput, Problem

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations; `auto` takes bf16 where the hardware computes in it."""
    if precision != "auto":
        return _DTYPES[precision]
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        features = torch.cpu.get_capabilities()
        return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32
    if accelerator.device_name() == "cuda":
        # Emulated, it is slower than fp16.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if accelerator.is_bf16_supported() else torch.float16


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The user's DeepSpeed settings, `auto` values still in place.

    Raises:
        BadInput: no such file, or not a JSON object.
    """
    field = "parallel.deepspeed"
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "no such file"
        raise BadInput(Problem(field, str(path), wrong, "give a DeepSpeed JSON, as in ds_configs/"))
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadInput(Problem(field, str(path), f"not valid JSON ({error})", "correct the file")) from None
    except OSError as error:
        wrong = f"cannot be read ({error.strerror or error})"
        raise BadInput(Problem(field, str(path), wrong, "give a DeepSpeed JSON, as in ds_configs/")) from None
    if not isinstance(settings, dict):
        raise BadInput(Problem(field, str(path), "not a JSON object", "correct the file"))
    return settings


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON would take the last of two values of one key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# The recipe decides these; what a DeepSpeed JSON says of them is left out.
_OURS = ("train_batch_size", "optimizer", "scheduler", "tensor_parallel")


def without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings but for every `auto`, at any depth."""
    kept = {key: value for key, value in settings.items() if value != "auto"}
    return {key: without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def fill_auto(settings: dict[str, Any], dtype: torch.dtype, optim: OptimSettings | None) -> dict[str, Any]:
    """DeepSpeed settings with every `auto` this project owns filled from the run's settings.

    Batch sizes stay out but for the micro-batch: DeepSpeed's own product of them counts tensor-parallel ranks too.
    Optimizer and schedule are the recipe's. An `auto` left anywhere else falls back to DeepSpeed's default.
    """
    filled = without_auto({k: v for k, v in settings.items() if k not in _OURS})
    filled["train_micro_batch_size_per_gpu"] = optim.micro_batch if optim else 1
    # We own the step boundary: what a mean over the tokens of all micro-batches needs.
    filled["gradient_accumulation_steps"] = 1
    filled["managed_gradient_accumulation"] = False
    filled["gradient_clipping"] = optim.clip_norm if optim else 0.0
    # Without its look at the gradient ZeRO 1 and 2 would take a NaN for a step.
    filled["bf16"] = {**filled.get("bf16", {}), "enabled": dtype == torch.bfloat16, "check_grad_overflow": True}
    filled["fp16"] = {**filled.get("fp16", {}), "enabled": dtype == torch.float16}
    filled["steps_per_print"] = 10**9
    return filled
