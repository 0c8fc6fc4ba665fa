"""Divergences between next-token distributions given as log-probabilities, exact over the vocabulary.

The plain form of each, differentiable by autograd: what `closed_forms.py` is proven against, and what evaluation reads.
`student` is log q [N, V] and `teacher` log p [N, V]; gradients flow to the student only, and each gives nats a token.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LogProbs = Float[Tensor, "n vocab"]


def exact(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """In fp32, whatever their dtype; fp64 stays fp64, for proofs by finite differences."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probabilities(logits: Float[Tensor, "n vocab"]) -> LogProbs:
    """log softmax in fp32 or fp64."""
    return exact(logits).log_softmax(-1)


def kl(first: LogProbs, second: LogProbs) -> Float[Tensor, " n"]:
    """KL(first ‖ second) = Σ_v first_v · (log first_v − log second_v) at each position.

    Gradients flow to both arguments. A token that `first` rules out (−inf) adds nothing.
    """
    ruled_out = first == -torch.inf
    # Masked before the product: 0 · inf would be NaN in the value and in the gradient.
    difference = torch.where(ruled_out, 0.0, first - torch.where(ruled_out, 0.0, second))
    return (first.exp() * difference).sum(-1)


def reverse_kl(student: LogProbs, teacher: LogProbs) -> Float[Tensor, " n"]:
    """KL(q‖p), through both factors of q log q (MiniLLM's Single, Eq. 3)."""
    return kl(student, teacher.detach())


def forward_kl(student: LogProbs, teacher: LogProbs) -> Float[Tensor, " n"]:
    """KL(p‖q)."""
    return kl(teacher.detach(), student)


def mix(first: LogProbs, second: LogProbs, share: float) -> LogProbs:
    """log(share · first + (1 − share) · second), for a share within (0, 1)."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def jsd(student: LogProbs, teacher: LogProbs, beta: float) -> Float[Tensor, " n"]:
    """β KL(p‖m) + (1 − β) KL(q‖m) with m = βp + (1 − β)q (GKD, arXiv 2306.13649).

    β = 0 means forward KL and β = 1 reverse KL, the limits of JSD/β and JSD/(1 − β).
    """
    if beta in (0, 1):
        return reverse_kl(student, teacher) if beta else forward_kl(student, teacher)
    teacher = teacher.detach()
    mixture = mix(teacher, student, beta)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def skew_kl(student: LogProbs, teacher: LogProbs, alpha: float) -> Float[Tensor, " n"]:
    """KL(p ‖ αp + (1 − α)q) (DistiLLM, arXiv 2402.03898); α = 0 is forward KL."""
    teacher = teacher.detach()
    return kl(teacher, mix(teacher, student, alpha) if alpha else student)


def skew_rkl(student: LogProbs, teacher: LogProbs, alpha: float) -> Float[Tensor, " n"]:
    """KL(q ‖ (1 − α)p + αq) (DistiLLM, arXiv 2402.03898); α = 0 is reverse KL."""
    teacher = teacher.detach()
    return kl(student, mix(student, teacher, alpha) if alpha else teacher)


def tvd(student: LogProbs, teacher: LogProbs) -> Float[Tensor, " n"]:
    """Total variation distance, ½ Σ_v |p_v − q_v|, within [0, 1]."""
    return (teacher.detach().exp() - student.exp()).abs().sum(-1) / 2


def akl(student: LogProbs, teacher: LogProbs, mu: float) -> Float[Tensor, " n"]:
    """Adaptive KL (arXiv 2404.02657): head share · KL(p‖q) + tail share · KL(q‖p).

    The head is the teacher's likeliest tokens up to probability μ; a part's share is its share of Σ_v |p_v − q_v|,
    taken as a constant.
    """
    share = akl_head_share(student.detach().exp(), teacher.detach().exp(), mu)
    return share * forward_kl(student, teacher) + (1 - share) * reverse_kl(student, teacher)


def akl_head_share(q: Float[Tensor, "n vocab"], p: Float[Tensor, "n vocab"], mu: float) -> Float[Tensor, " n"]:
    """The head's share of the gap between the models; ½ where there is no gap."""
    gap = (p - q).abs()
    ordered, order = p.sort(dim=-1, descending=True)
    # The token that reaches μ still belongs to the head.
    in_head = ordered.cumsum(-1) - ordered < mu
    head, total = (gap.gather(-1, order) * in_head).sum(-1), gap.sum(-1)
    return torch.where(total > 0, head / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)


def sorted_distance(student: LogProbs, teacher: Float[Tensor, "n teacher_vocab"]) -> Float[Tensor, " n"]:
    """Σ_i |p_(i) − q_(i)| over probabilities in descending order (ULD, arXiv 2402.12030), within [0, 2].

    The vocabularies may differ; the smaller is filled up with tokens of probability 0.
    """
    q, p = (of.exp().sort(dim=-1, descending=True).values for of in (student, teacher.detach()))
    width = max(q.shape[1], p.shape[1])
    return (padded(q, width) - padded(p, width)).abs().sum(-1)


def padded(probabilities: Float[Tensor, "n vocab"], width: int) -> Float[Tensor, "n width"]:
    """At least `width` columns, the new ones 0."""
    return torch.nn.functional.pad(probabilities, (0, max(width - probabilities.shape[1], 0)))


def entropy(logprobs: LogProbs, probabilities: Float[Tensor, "n vocab"] | None = None) -> Float[Tensor, " n"]:
    """−Σ_v p_v log p_v at each position, in nats; `probabilities` where the caller has them already."""
    weights = logprobs.exp() if probabilities is None else probabilities
    return -torch.linalg.vecdot(weights, logprobs.clamp_min(torch.finfo(logprobs.dtype).min))
