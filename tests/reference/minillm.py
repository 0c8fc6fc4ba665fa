"""MiniLLM's rewards, advantages and loss (Gu et al., arXiv 2306.08543, Eq. 3 to 6), one token at a time."""

import math
from typing import Any

import torch
from torch import Tensor

from reference.divergences import entropy, kl
from reference.sampling import Rollout

Sums = dict[str, float]


def rewards(rollout: Rollout, knobs: dict[str, Any]) -> list[float]:
    """r_t = (log p − log q_old) / scale, clipped."""
    found = [(p - q) / knobs["reward_scale"] for p, q in zip(rollout.log_p, rollout.log_q, strict=True)]
    most = knobs["reward_clip"]
    return found if most is None else [max(-most, min(most, r)) for r in found]


def returns(rollout: Rollout, knobs: dict[str, Any]) -> list[float]:
    """R_t: the discounted rewards from this token on, or from the next; divided by how many they are."""
    r, gamma, found = rewards(rollout, knobs), knobs["gamma"], []
    for t in range(len(r)):
        first = t if knobs["first_reward"] == "current" else t + 1
        terms = [gamma ** (later - t) * r[later] for later in range(first, len(r))]
        total = sum(terms)
        found.append(total / len(terms) if knobs["length_normalised"] and terms else total)
    return found


def advantages(rollouts: list[Rollout], knobs: dict[str, Any], ranks: int, micro_batch: int) -> list[list[float]]:
    """Returns, whitened as the knobs say.

    Row k of a step is row k // ranks of rank k % ranks. `padded_micro_batch` takes the rows of one micro-batch of all
    ranks together, each rank's padded with zeros to that rank's longest.
    """
    table = [returns(rollout, knobs) for rollout in rollouts]
    if knobs["whitening"] == "none":
        return table
    if knobs["whitening"] == "tokens":
        pool = [value for row in table for value in row]
        return [[standardised(value, pool) for value in row] for row in table]
    pools: dict[int, list[float]] = {}
    place = {k: (k % ranks, k // ranks // micro_batch) for k in range(len(table))}
    for rank, number in sorted(set(place.values())):
        rows = [table[k] for k in place if place[k] == (rank, number)]
        width = max(map(len, rows))
        pools.setdefault(number, []).extend(v for row in rows for v in [*row, *[0.0] * (width - len(row))])
    return [[standardised(value, pools[place[k][1]]) for value in row] for k, row in enumerate(table)]


def standardised(value: float, pool: list[float]) -> float:
    """(R − mean)·rsqrt(var + 1e-8) with the population's variance."""
    mean = math.fsum(pool) / len(pool)
    variance = math.fsum((v - mean) ** 2 for v in pool) / len(pool)
    return (value - mean) / math.sqrt(variance + 1e-8)


def loss(
    rollout: Rollout, advantage: list[float], student: Tensor, teacher: Tensor, knobs: dict[str, Any]
) -> tuple[Tensor, Sums]:
    """Long + Single summed over one response; `student` and `teacher` are logits [tokens, vocabulary]."""
    total, sums = torch.zeros((), dtype=torch.float64), dict.fromkeys(FIGURES, 0.0)
    sums["reward/mean"] = sum(rewards(rollout, knobs))
    clip = knobs["ratio_clip"]
    for t, token in enumerate(rollout.response):
        log_q = student[t].log_softmax(-1)
        q, p = log_q.exp(), teacher[t].softmax(-1)
        ratio = (log_q[token] - rollout.log_q[t]).exp() * rollout.weights[t]
        plain, clipped = -advantage[t] * ratio, -advantage[t] * ratio.clamp(1 - clip, 1 + clip)
        long, single = torch.maximum(plain, clipped), kl(q, p)
        weighted = single * rollout.weights[t] if knobs["weighted_single_step"] else single
        total = total + long + (weighted if knobs["single_step"] else 0.0)
        for name, value in (
            ("loss/long", float(long)),
            ("loss/single", float(weighted)),
            ("student/reverse_kl", float(single)),
            ("student/entropy", entropy(student[t])),
            ("teacher/entropy", entropy(teacher[t])),
            ("policy/clip_fraction", float(clipped > plain)),
            ("policy/approx_kl_to_behavior", rollout.log_q[t] - float(log_q[token])),
        ):
            sums[name] += value
    return total, sums


FIGURES = (
    "loss/long",
    "loss/single",
    "student/reverse_kl",
    "student/entropy",
    "teacher/entropy",
    "policy/clip_fraction",
    "policy/approx_kl_to_behavior",
    "reward/mean",
)
