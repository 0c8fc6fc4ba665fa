"""How varied responses are, by their distinct n-grams (Li et al. 2016, arXiv 1510.03055)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Odd, and far from any vocabulary's size: the n-grams of one response get different numbers, but by a chance of 2^-50.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64
_NONE = torch.iinfo(torch.long).max


def distinct_share(
    ids: Int[Tensor, "batch response"], lengths: Int[Tensor, " batch"], n: int = 4
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Distinct n-grams of a response over all its n-grams: their sum over the rows, and how many rows have any.

    Li et al. pool the n-grams of all responses. A mean of rows does not depend on how these lie on the ranks.
    """
    if ids.shape[1] < n:
        return ids.new_zeros((), dtype=torch.float64), ids.new_zeros(())
    grams = ids.new_zeros((len(ids), ids.shape[1] - n + 1))
    for place in range(n):
        grams = grams * _FACTOR + ids[:, place : place + grams.shape[1]]
    counts = (lengths - n + 1).clamp_min(0)
    columns = torch.arange(grams.shape[1], device=ids.device)
    # What is no n-gram goes to the end of its row, all alike.
    ordered = torch.where(columns < counts[:, None], grams, _NONE).sort(dim=1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    distinct = (new & (columns < counts[:, None])).sum(1)
    return (distinct.double() / counts.clamp_min(1)).sum(), (counts > 0).sum()
