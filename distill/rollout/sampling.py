"""Drawing one token: proposals, inverse CDF, importance weights. Pure functions; B rows, V vocabulary."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.config import RolloutSettings

# Separate random streams: no draw of one kind can shift those of another.
_COINS, _TOKENS = 0, 1


def proposal(logits: Float[Tensor, "batch vocab"], settings: RolloutSettings) -> Float[Tensor, "batch vocab"]:
    """fp32 log-probabilities of one component: tempered, cut by top-k then top-p, renormalised by itself.

    Both components are cut before they are mixed, so the mixture's support is the union of theirs.
    """
    scaled = logits.float() / settings.temperature
    if 0 < settings.top_k < scaled.shape[-1]:
        # scatter, not a threshold: ties at the k-th value must not let more than k through.
        values, index = scaled.topk(settings.top_k, dim=-1)
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, index, values)
    if settings.top_p < 1:
        scaled = _nucleus(scaled, settings.top_p)
    return scaled.log_softmax(-1)


def proposes_as_is(settings: RolloutSettings) -> bool:
    """Whether the proposal is the model's own distribution, neither tempered nor truncated."""
    return settings.temperature == 1 and settings.top_k == 0 and settings.top_p == 1


def _nucleus(logits: Float[Tensor, "batch vocab"], top_p: float) -> Float[Tensor, "batch vocab"]:
    """Keep the likeliest tokens until their mass reaches `top_p`; the one that reaches it stays."""
    ordered, index = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(-1)
    ordered = ordered.masked_fill(mass.cumsum(-1) - mass >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, index, ordered)


def draw(logprobs: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Inverse-CDF draw, one uniform in [0, 1) a row; a token of probability 0 is never drawn."""
    cdf = logprobs.exp().cumsum(-1)
    total = cdf[:, -1]
    # Rounding may leave the total beside 1 and push u·total onto it, where no token lies.
    point = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, point[:, None], right=True).squeeze(-1)


def importance_weights(
    student: Float[Tensor, "batch response"], teacher: Float[Tensor, "batch response"], alpha: float
) -> Float[Tensor, "batch response"]:
    """w = q/p̃ with p̃ = αp + (1−α)q, from the proposals' log-probabilities of the drawn tokens (Eq. 5).

    In [0, 1/(1−α)]: 0 where only the teacher could draw the token, exactly 1 for α = 0.
    """
    if alpha == 0:
        return torch.ones_like(student)
    mixture = torch.logaddexp(math.log(alpha) + teacher, math.log1p(-alpha) + student)
    return (student - mixture).exp()


def coins(
    settings: RolloutSettings, seed: int, round_index: int, row_ids: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch response"]:
    """True where the teacher draws. A row's coins depend on (seed, round) when shared, and on the row too when not."""
    length = settings.max_new_tokens
    if settings.coins == "shared":
        row = np.random.default_rng([seed, _COINS, round_index]).random(length)
        flips = np.broadcast_to(row, (len(row_ids), length))
    else:
        flips = np.stack(
            [np.random.default_rng([seed, _COINS, round_index, row]).random(length) for row in row_ids.tolist()]
        )
    return torch.from_numpy(flips < settings.alpha)


def token_uniforms(
    settings: RolloutSettings, seed: int, round_index: int, row_ids: Int[Tensor, " batch"]
) -> Float[Tensor, "batch response"]:
    """A row's uniforms depend on (seed, round, row) alone, so any batching samples the same rollouts."""
    rows = [
        np.random.default_rng([seed, _TOKENS, round_index, row]).random(settings.max_new_tokens, dtype=np.float32)
        for row in row_ids.tolist()
    ]
    return torch.from_numpy(np.stack(rows))
