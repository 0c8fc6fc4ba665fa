"""AdamW, the global norm's clip, and the learning rate's schedule, as formulas in fp64."""

import math
from typing import Any

import torch
from torch import Tensor


def rate(step: int, optim: dict[str, Any]) -> float:
    """The learning rate of the 0-based step: a line up over the warm-up, then the schedule's shape."""
    warmup = optim["warmup_steps"]
    if step < warmup:
        return optim["lr"] * (step + 1) / (warmup + 1)
    share = min((step - warmup) / max(optim["steps"] - warmup, 1), 1.0)
    shapes = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return optim["lr"] * shapes[optim["schedule"]]


class AdamW:
    """Decoupled weight decay of matrices; vectors are exempt."""

    def __init__(self, parameters: dict[str, Tensor], optim: dict[str, Any]):
        self.optim = optim
        self.masters = {name: p.detach().double().clone() for name, p in parameters.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.smallest = {name: torch.full_like(p, torch.inf) for name, p in self.masters.items()}
        """The smallest size of each element's gradient so far that is not 0, as a share of the global norm."""
        self.steps = 0

    def step(self, gradients: dict[str, Tensor]) -> tuple[float, float]:
        """Update the weights; the gradient's norm before the clip, and the rate that was taken."""
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        clip = min(1.0, self.optim["clip_norm"] / (norm + 1e-6))
        lr, (beta1, beta2) = rate(self.steps, self.optim), self.optim["betas"]
        self.steps += 1
        for name, weight in self.masters.items():
            g = gradients[name] * clip
            share = gradients[name].abs() / norm
            self.smallest[name] = torch.minimum(self.smallest[name], torch.where(share == 0, torch.inf, share))
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * g
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * g * g
            mean = self.first[name] / (1 - beta1**self.steps)
            spread = (self.second[name] / (1 - beta2**self.steps)).sqrt()
            decay = self.optim["weight_decay"] if weight.ndim > 1 else 0.0
            self.masters[name] = weight - lr * decay * weight - lr * mean / (spread + 1e-8)
        return norm, lr
