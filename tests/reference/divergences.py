"""Divergences at one token, from both models' logits over the vocabulary; autograd gives the gradient.

`q` is the student, `p` the teacher, both fp64 probabilities. The teacher is a constant.
"""

import torch
from torch import Tensor


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Σ first (log first − log second)."""
    return (first * (first.log() - second.log())).sum()


def jsd(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q."""
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def akl(q: Tensor, p: Tensor, mu: float) -> Tensor:
    """Forward and reverse KL, weighted by the head's and the tail's share of Σ|p − q|."""
    order = sorted(range(len(p)), key=lambda v: -float(p[v]))
    head, reached = [], 0.0
    for v in order:
        if reached >= mu:
            break
        head.append(v)
        reached += float(p[v])
    gap = (p - q).abs().detach()
    share = float(gap[head].sum() / gap.sum())
    return share * kl(p, q) + (1 - share) * kl(q, p)


DIVERGENCES = {
    "forward_kl": lambda q, p: kl(p, q),
    "reverse_kl": lambda q, p: kl(q, p),
    "jsd": jsd,
    "skew_kl": lambda q, p, alpha: kl(p, alpha * p + (1 - alpha) * q),
    "skew_rkl": lambda q, p, alpha: kl(q, (1 - alpha) * p + alpha * q),
    "akl": akl,
    "tvd": lambda q, p: (p - q).abs().sum() / 2,
}


def tempered(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0, **knobs: float) -> Tensor:
    """τ² D(softmax(z_q/τ), softmax(z_p/τ))."""
    q, p = (student / temperature).softmax(-1), (teacher.detach() / temperature).softmax(-1)
    return temperature**2 * DIVERGENCES[name](q, p, **knobs)


def taid(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """KL(softmax((1 − t)·z_q + t·z_p) ‖ q), the target a constant."""
    target = ((1 - t) * student.detach() + t * teacher.detach()).softmax(-1)
    return kl(target, student.softmax(-1))


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_i |p_(i) − q_(i)| over probabilities in descending order; the shorter list is filled up with zeros."""
    q = student.softmax(-1).sort(descending=True).values
    p = teacher.detach().softmax(-1).sort(descending=True).values
    width = max(len(q), len(p))
    q, p = (torch.cat([x, x.new_zeros(width - len(x))]) for x in (q, p))
    return (p - q).abs().sum()


def entropy(logits: Tensor) -> float:
    """−Σ p log p in nats."""
    logprobs = logits.detach().log_softmax(-1)
    return float(-(logprobs.exp() * logprobs).sum())
