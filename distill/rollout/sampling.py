"""Drawing one token: proposals, inverse CDF, importance weights. Pure functions; B rows, V vocabulary."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.config import RolloutSettings

# Separate random streams: no draw of one kind can shift those of another.
_COINS, _TOKENS, _REQUESTS = 0, 1, 2
# Tokens summed together while drawing; about the square root of a vocabulary.
_BLOCK = 256


def proposal(logits: Float[Tensor, "batch vocab"], settings: RolloutSettings) -> Float[Tensor, "batch vocab"]:
    """fp32 logits of one component, tempered, then cut by top-k and top-p (−inf where cut). Not normalised.

    Both components are cut before they are mixed, so the mixture's support is the union of theirs.
    """
    scaled = logits.float()
    if settings.temperature != 1:
        scaled = scaled / settings.temperature
    if 0 < settings.top_k < scaled.shape[-1]:
        # scatter, not a threshold: ties at the k-th value must not let more than k through.
        values, index = scaled.topk(settings.top_k, dim=-1)
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, index, values)
    return _nucleus(scaled, settings.top_p) if settings.top_p < 1 else scaled


def proposes_as_is(settings: RolloutSettings) -> bool:
    """Whether the proposal is the model's own distribution, neither tempered nor truncated."""
    return settings.temperature == 1 and settings.top_k == 0 and settings.top_p == 1


def _nucleus(logits: Float[Tensor, "batch vocab"], top_p: float) -> Float[Tensor, "batch vocab"]:
    """Keep the likeliest tokens until their mass reaches `top_p`; the one that reaches it stays."""
    ordered, index = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(-1)
    ordered = ordered.masked_fill(mass.cumsum(-1) - mass >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, index, ordered)


def draw(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Inverse-CDF draw from softmax(logits), one uniform in [0, 1) a row; a token of probability 0 is never drawn.

    The sum over the vocabulary is taken in blocks, and only the block that the draw falls into is summed token by
    token: a cumulative sum over the whole vocabulary takes longer than all the rest. Where logits are NaN any token may
    come, with a log-probability of NaN.

    Returns the tokens, and log Σ exp(logits), which turns a logit into its log-probability.
    """
    rows, vocab = logits.shape
    top = logits.amax(-1, keepdim=True)
    masses = (logits - top).exp_()
    if short := -vocab % _BLOCK:
        masses = torch.nn.functional.pad(masses, (0, short))
    blocks = masses.view(rows, -1, _BLOCK)
    block_cdf = blocks.sum(-1).cumsum(-1)
    total = block_cdf[:, -1]
    point = _below(uniforms * total, total)
    # No number is found in a NaN's place: the search ends behind the last one.
    block = torch.searchsorted(block_cdf, point[:, None], right=True).clamp_max(blocks.shape[1] - 1)
    before = torch.where(block > 0, block_cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    cdf = blocks[torch.arange(rows, device=logits.device), block.squeeze(1)].cumsum(-1)
    within = _below(point - before.squeeze(1), cdf[:, -1]).clamp_min(0)
    place = torch.searchsorted(cdf, within[:, None], right=True)
    return (block * _BLOCK + place).squeeze(1).clamp_max(vocab - 1), total.log() + top.squeeze(1)


def _below(point: Float[Tensor, " batch"], total: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The point, or the last number before `total`: rounding may push it onto the total, where no token lies."""
    return torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))


def logprob_of(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """fp32 log softmax(logits) at one token a row."""
    # The whole of it: one kernel, in half the time of logsumexp.
    return logits.log_softmax(-1, dtype=torch.float32).gather(-1, tokens[:, None]).squeeze(-1)


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


def request_seeds(seed: int, round_index: int, row_ids: Int[Tensor, " batch"]) -> list[int]:
    """A seed in [0, 2^63) for each row, for engines that draw by themselves; of (seed, round, row) alone."""
    streams = [np.random.default_rng([seed, _REQUESTS, round_index, row]) for row in row_ids.tolist()]
    return [int(stream.integers(2**63)) for stream in streams]
