"""Divergences between next-token distributions given as log-probabilities, exact over the vocabulary."""

import torch
from jaxtyping import Float
from torch import Tensor

LogProbs = Float[Tensor, "n vocab"]


def log_probabilities(logits: Float[Tensor, "n vocab"]) -> LogProbs:
    """log softmax in fp32, whatever the logits' dtype; fp64 stays fp64, for proofs by finite differences."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def kl(first: LogProbs, second: LogProbs) -> Float[Tensor, " n"]:
    """KL(first ‖ second) = Σ_v first_v · (log first_v − log second_v) at each position, in nats.

    Gradients flow to both arguments; detach the teacher. A token that `first` rules out (−inf) adds nothing.
    """
    ruled_out = first == -torch.inf
    # Masked before the product: 0 · inf would be NaN in the value and in the gradient.
    difference = torch.where(ruled_out, 0.0, first - torch.where(ruled_out, 0.0, second))
    return (first.exp() * difference).sum(-1)


def reverse_kl(student: LogProbs, teacher: LogProbs) -> Float[Tensor, " n"]:
    """KL(q‖p), gradient to the student only, through both factors of q log q (Eq. 3, Single)."""
    return kl(student, teacher.detach())


def reverse_kl_parts(
    student: LogProbs, teacher: LogProbs
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, "n vocab"], Float[Tensor, " n"]]:
    """q, d = log q − log p (0 where q rules a token out) and KL(q‖p) = Σ_v q_v d_v, in as few passes as it takes.

    The closed form of the gradient follows: ∂KL/∂logit_v = q_v (d_v − KL).
    """
    q = student.exp()
    difference = torch.where(student == -torch.inf, 0.0, student - teacher)
    return q, difference, torch.linalg.vecdot(q, difference)


def forward_kl(student: LogProbs, teacher: LogProbs) -> Float[Tensor, " n"]:
    """KL(p‖q), gradient to the student only."""
    return kl(teacher.detach(), student)


def entropy(logprobs: LogProbs, probabilities: Float[Tensor, "n vocab"] | None = None) -> Float[Tensor, " n"]:
    """−Σ_v p_v log p_v at each position, in nats; `probabilities` where the caller has them already."""
    weights = logprobs.exp() if probabilities is None else probabilities
    return -torch.linalg.vecdot(weights, logprobs.clamp_min(torch.finfo(logprobs.dtype).min))
