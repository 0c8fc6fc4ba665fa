"""Drawing from the teacher-mixed distribution, one token at a time (MiniLLM, Eq. 4 and 5)."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reference import chance
from reference.models import Model


@dataclass
class Rollout:
    """One sampled response, with what both models said of each of its tokens when it was drawn."""

    prompt: list[int]
    response: list[int] = field(default_factory=list)
    log_q: list[float] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    from_teacher: list[bool] = field(default_factory=list)
    ended: bool = False


def proposal(logits: Tensor, temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities of one component: tempered, cut to the k likeliest, then to the smallest set of mass top_p."""
    probabilities = (logits / temperature).softmax(-1).tolist()
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = order[:top_k] if top_k else order
    mass = sum(probabilities[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if reached >= top_p:
            break
        nucleus.append(token)
        reached += probabilities[token] / mass
    total = sum(probabilities[token] for token in nucleus)
    chosen = set(nucleus)
    return [p / total if token in chosen else 0.0 for token, p in enumerate(probabilities)]


def invert(probabilities: list[float], uniform: float) -> int:
    """The token in whose stretch of the cumulative distribution the uniform number lies."""
    reached = 0.0
    for token, probability in enumerate(probabilities):
        reached += probability
        if uniform < reached:
            return token
    return max(token for token, probability in enumerate(probabilities) if probability > 0)


def sample(
    student: Model,
    teacher: Model | None,
    prompt: list[int],
    row: int,
    round_index: int,
    seed: int,
    rollout: dict[str, Any],
    ends: set[int],
) -> Rollout:
    """Draw a response to one prompt. Where `alpha` is 0 the teacher only scores."""
    limit, alpha = rollout["max_new_tokens"], rollout["alpha"]
    flips = chance.coins(seed, round_index, row, limit, alpha, rollout["coins"] == "shared")
    numbers = chance.uniforms(seed, round_index, row, limit)
    knobs = rollout["temperature"], rollout["top_k"], rollout["top_p"]
    found = Rollout(prompt)
    for flip, number in zip(flips, numbers, strict=True):
        so_far = prompt + found.response
        q_logits = student.next_logits(so_far)
        p_logits = q_logits if teacher is None else teacher.next_logits(so_far)
        q, p = proposal(q_logits, *knobs), proposal(p_logits, *knobs)
        by_teacher = flip and teacher is not None
        token = invert(p if by_teacher else q, number)
        mixture = alpha * p[token] + (1 - alpha) * q[token]
        found.response.append(token)
        found.log_q.append(float(q_logits.log_softmax(-1)[token]))
        found.log_p.append(float(p_logits.log_softmax(-1)[token]) if teacher is not None else 0.0)
        found.weights.append(q[token] / mixture if alpha and teacher is not None else 1.0)
        found.from_teacher.append(by_teacher)
        if token in ends:
            found.ended = True
            break
    return found


def distinct_4(rollouts: list[Rollout]) -> float:
    """Mean over the responses that have a 4-gram: distinct 4-grams over all of them."""
    shares = []
    for one in rollouts:
        grams = [tuple(one.response[i : i + 4]) for i in range(len(one.response) - 3)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares)


def effective_sample_size(weights: list[float]) -> float:
    """Kish's (Σw)² / (n Σw²)."""
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))


def no_gradient(model: Model, prompt: list[int], response: list[int]) -> Tensor:
    """The model's logits at each token of a response, as constants."""
    with torch.no_grad():
        return model.response_logits(prompt, response)
