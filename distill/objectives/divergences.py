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


def reverse_kl_gradient(
    probabilities: LogProbs, student: LogProbs, teacher: LogProbs, divergence: Float[Tensor, " n"]
) -> Float[Tensor, "n vocab"]:
    """∂KL(q‖p)/∂logits of the student: q_v (log q_v − log p_v − KL); 0 where q rules a token out."""
    difference = torch.where(student == -torch.inf, 0.0, student - teacher - divergence[:, None])
    return probabilities * difference


def forward_kl(student: LogProbs, teacher: LogProbs) -> Float[Tensor, " n"]:
    """KL(p‖q), gradient to the student only."""
    return kl(teacher.detach(), student)


def entropy(logprobs: LogProbs) -> Float[Tensor, " n"]:
    """−Σ_v p_v log p_v at each position, in nats."""
    return -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)
