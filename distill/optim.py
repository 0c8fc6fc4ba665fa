"""Which parameters decay, and how the learning rate moves."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distill.config import OptimSettings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not. Shapes are those before sharding."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) > 1 else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate_factor(step: int, settings: OptimSettings) -> float:
    """Share of the peak rate at optimizer step `step` (0-based): linear warm-up, then the chosen shape."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    remaining = max(settings.steps - settings.warmup_steps, 1)
    progress = min((step - settings.warmup_steps) / remaining, 1.0)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if settings.schedule == "linear" else 1.0


def schedule(optimizer: Optimizer, settings: OptimSettings) -> LambdaLR:
    """The schedule as torch knows it; DeepSpeed steps and saves it."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
