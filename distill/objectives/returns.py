"""From rewards to advantages: reward-to-go, length normalisation, whitening (Eq. 6)."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.objectives.terms import Reduce


def token_rewards(
    teacher_logprobs: Float[Tensor, "batch response"],
    behavior_logprobs: Float[Tensor, "batch response"],
    scale: float,
    clip: float | None,
) -> Float[Tensor, "batch response"]:
    """r_t = (log p(y_t) − log q_old(y_t)) / scale, clipped to ± clip."""
    rewards = (teacher_logprobs - behavior_logprobs) / scale
    return rewards if clip is None else rewards.clamp(-clip, clip)


def reward_to_go(
    rewards: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    gamma: float,
    first: Literal["current", "next"],
    length_normalised: bool,
) -> Float[Tensor, "batch response"]:
    """R_t = Σ_{t'} γ^{t'−t} r_t' over t' = t … T_i (`current`) or t+1 … T_i (`next`), divided by its number of terms.

    0 where the sum has no term and at padding.
    """
    returns = torch.zeros_like(rewards)
    masked = rewards * mask
    later = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = gamma * later
        later = masked[:, t] + following
        returns[:, t] = later if first == "current" else following
    if length_normalised:
        lengths = mask.sum(1, keepdim=True)
        position = torch.arange(rewards.shape[1], device=rewards.device)
        terms = lengths - position - (1 if first == "next" else 0)
        returns = returns / terms.clamp_min(1)
    return returns * mask


def whiten(
    returns: Sequence[Float[Tensor, "batch response"]],
    masks: Sequence[Bool[Tensor, "batch response"]],
    over: Literal["none", "tokens", "padded_micro_batch"],
    reduce: Reduce,
) -> list[Float[Tensor, "batch response"]]:
    """(R − mean)·rsqrt(var + 1e-8), population variance, statistics summed over the data-parallel ranks by `reduce`.

    `tokens`: over the real tokens of all micro-batches together, so the split does not matter. `padded_micro_batch`:
    over each micro-batch's window with padding counted as 0, as the authors' code does; there the split does matter.
    """
    if over == "none":
        return list(returns)
    if over == "tokens":
        mean, inverse_std = _moments(torch.cat([r[m] for r, m in zip(returns, masks, strict=True)]), reduce)
        return [(r - mean) * inverse_std * m for r, m in zip(returns, masks, strict=True)]
    whitened = []
    for values, mask in zip(returns, masks, strict=True):
        mean, inverse_std = _moments(values.flatten(), reduce)
        whitened.append((values - mean) * inverse_std * mask)
    return whitened


def _moments(values: Float[Tensor, " n"], reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean and rsqrt(population variance + 1e-8) over all ranks; fp64, and two passes, so that no digits cancel."""
    exact = values.double()
    total, count = reduce(torch.stack([exact.sum(), exact.new_tensor(float(len(exact)))]))
    mean = total / count
    variance = reduce((exact - mean).square().sum()) / count
    return mean.to(values.dtype), (variance + 1e-8).rsqrt().to(values.dtype)
