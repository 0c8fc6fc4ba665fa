"""Each divergence with its gradient in closed form: what training takes, chunk by chunk, without autograd.

Of a divergence D(q, p) with slope g_v = ∂D/∂q_v the gradient at the student's logits is q_v (g_v − Σ_u q_u g_u). Every
function takes log q and log p [N, V] and returns D [N] in nats and that gradient [N, V]. The inputs may be overwritten.

Vocabulary-parallel, V is this rank's `shard` of it, D the whole sum, and the gradient the one at these ids. That takes
one all-reduce of a few numbers a token, after the two with which `VocabShard.log_softmax` normalises both models.
"""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from distill.models.vocab_shard import WHOLE, VocabShard
from distill.objectives.divergences import LogProbs, akl_head_share, mix, padded

ValueAndGradient = tuple[Float[Tensor, " n"], Float[Tensor, "n vocab"]]


class ClosedForm(Protocol):
    """A divergence with all its knobs given."""

    def __call__(self, student: LogProbs, teacher: LogProbs, *, shard: VocabShard) -> ValueAndGradient:
        """D, and its gradient at the student's logits."""
        ...


LOWEST = -1e30
"""In place of log 0: its products with probability 0 are 0, and what one model rules out costs a lot, not inf."""


def reverse_kl_parts(
    student: LogProbs, teacher: LogProbs
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, "n vocab"], Float[Tensor, " n"]]:
    """q, d = log q − log p and this rank's part of KL(q‖p) = Σ_v q_v d_v; the gradient is q_v (d_v − KL)."""
    q = student.exp()
    difference = student.clamp_min(LOWEST).sub_(teacher.clamp_min(LOWEST))
    return q, difference, torch.linalg.vecdot(q, difference)


def reverse_kl(student: LogProbs, teacher: LogProbs, shard: VocabShard = WHOLE) -> ValueAndGradient:
    """KL(q‖p): g = log q − log p + 1."""
    q, difference, part = reverse_kl_parts(student, teacher)
    (value,) = shard.sum(part)
    return value, difference.sub_(value[:, None]).mul_(q)


def forward_kl(student: LogProbs, teacher: LogProbs, shard: VocabShard = WHOLE) -> ValueAndGradient:
    """KL(p‖q): the gradient is q − p."""
    p = teacher.exp()
    difference = teacher.clamp_min(LOWEST).sub_(student.clamp_min(LOWEST))
    (value,) = shard.sum(torch.linalg.vecdot(p, difference))
    return value, student.exp().sub_(p)


def jsd(student: LogProbs, teacher: LogProbs, beta: float, shard: VocabShard = WHOLE) -> ValueAndGradient:
    """β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q: g = (1 − β) log(q/m), the other terms cancel."""
    if beta in (0, 1):
        return reverse_kl(student, teacher, shard) if beta else forward_kl(student, teacher, shard)
    q, p, mixture = student.exp(), teacher.exp(), mix(teacher, student, beta).clamp_min_(LOWEST)
    to_student = student.clamp_min(LOWEST).sub_(mixture)
    to_teacher = teacher.clamp_min(LOWEST).sub_(mixture)
    part = beta * torch.linalg.vecdot(p, to_teacher) + (1 - beta) * torch.linalg.vecdot(q, to_student)
    return _through_softmax(part, q, (1 - beta) * to_student, shard)


def skew_kl(student: LogProbs, teacher: LogProbs, alpha: float, shard: VocabShard = WHOLE) -> ValueAndGradient:
    """KL(p‖m), m = αp + (1 − α)q: g = −(1 − α) p/m."""
    if alpha == 0:
        return forward_kl(student, teacher, shard)
    q, p, mixture = student.exp(), teacher.exp(), mix(teacher, student, alpha).clamp_min_(LOWEST)
    to_teacher = teacher.clamp_min(LOWEST).sub_(mixture)
    part = torch.linalg.vecdot(p, to_teacher)
    return _through_softmax(part, q, _ratio(to_teacher, p).mul_(alpha - 1), shard)


def skew_rkl(student: LogProbs, teacher: LogProbs, alpha: float, shard: VocabShard = WHOLE) -> ValueAndGradient:
    """KL(q‖m), m = (1 − α)p + αq: g = log(q/m) + 1 − α q/m."""
    if alpha == 0:
        return reverse_kl(student, teacher, shard)
    q, mixture = student.exp(), mix(student, teacher, alpha).clamp_min_(LOWEST)
    to_student = student.clamp_min(LOWEST).sub_(mixture)
    part = torch.linalg.vecdot(q, to_student)
    return _through_softmax(part, q, to_student - alpha * _ratio(to_student, q), shard)


def tvd(student: LogProbs, teacher: LogProbs, shard: VocabShard = WHOLE) -> ValueAndGradient:
    """½ Σ|p − q|: g = ½ sign(q − p)."""
    q = student.exp()
    difference = q - teacher.exp()
    return _through_softmax(difference.abs().sum(-1) / 2, q, difference.sign_().div_(2), shard)


def akl(student: LogProbs, teacher: LogProbs, mu: float, shard: VocabShard = WHOLE) -> ValueAndGradient:
    """Head share · forward KL + tail share · reverse KL, the shares constant. Orders the whole vocabulary."""
    shard.require_whole("akl")
    share = akl_head_share(student.exp(), teacher.exp(), mu)
    forward, forward_gradient = forward_kl(student, teacher)
    reverse, reverse_gradient = reverse_kl(student, teacher)
    gradient = share[:, None] * forward_gradient + (1 - share)[:, None] * reverse_gradient
    return share * forward + (1 - share) * reverse, gradient


def sorted_distance(
    student: LogProbs, teacher: Float[Tensor, "n teacher_vocab"], shard: VocabShard = WHOLE
) -> ValueAndGradient:
    """Σ_i |p_(i) − q_(i)|: g_v = sign(q_v − p at v's rank). Orders the whole vocabulary."""
    shard.require_whole("uld")
    q = student.exp()
    ordered, order = q.sort(dim=-1, descending=True)
    p = padded(teacher.exp().sort(dim=-1, descending=True).values, q.shape[1])
    gap = padded(ordered, p.shape[1]) - p
    slope = torch.empty_like(q).scatter_(-1, order, gap[:, : q.shape[1]].sign())
    return _through_softmax(gap.abs().sum(-1), q, slope, shard)


def tempered(
    form: ClosedForm,
    student_logits: Float[Tensor, "n vocab"],
    teacher_logits: Float[Tensor, "n vocab"],
    temperature: float,
    shard: VocabShard = WHOLE,
) -> ValueAndGradient:
    """τ² D(softmax(z_q/τ), softmax(z_p/τ)) and its gradient at z_q; τ² keeps its size (arXiv 1503.02531)."""
    log_q, log_p = shard.log_softmax(student_logits / temperature, teacher_logits / temperature)
    value, gradient = form(log_q, log_p, shard=shard)
    return value * temperature**2, gradient * temperature


def _through_softmax(
    part: Float[Tensor, " n"], q: Float[Tensor, "n vocab"], slope: Float[Tensor, "n vocab"], shard: VocabShard
) -> ValueAndGradient:
    """The whole value of this rank's `part` of it, and the gradient at the logits from the slope in q."""
    value, mean = shard.sum(part, torch.linalg.vecdot(q, slope))
    return value, (slope - mean[:, None]).mul_(q)


def _ratio(log_ratio: Float[Tensor, "n vocab"], numerator: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """exp(log_ratio), and 0 where the numerator is 0: there the logarithms were clamped, their difference is void."""
    return torch.where(numerator > 0, log_ratio.exp(), 0.0)
