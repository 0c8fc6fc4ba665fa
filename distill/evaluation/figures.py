"""Scores of rows → figures with intervals, curves by position, and what parts two models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from distill.evaluation.prompt_sets import ChoiceSet
from distill.evaluation.scores import Scores, Tokens
from distill.evaluation.statistics import Estimate, Figure, mean, ratio
from distill.evaluation.text import distinct

DISTINCT = (1, 2, 3, 4)
# A position that fewer rows reach tells more of those rows than of the position.
_FEWEST_ROWS = 10
_BINS = 15

OF_ROWS = ("rouge_l", "exact_match", "length", "repetition", "ended")
"""Means over responses."""
ON_OWN = {"reverse_kl": "reverse_kl", "top1_agreement": "top1_on_own", "teacher_nll": "teacher_nll"}
"""Means over the tokens of a model's own responses, and what they are called."""
ON_TAUGHT = {"forward_kl": "forward_kl", "top1_agreement": "top1_agreement"}
"""Means over the tokens of the teacher's responses."""


def _tokens(scores: Scores) -> dict[str, tuple[Tokens, str]]:
    found: dict[str, tuple[Tokens, str]] = {}
    if scores.own is not None:
        found |= {name: (scores.own, key) for key, name in ON_OWN.items()}
    if scores.taught is not None:
        found |= {name: (scores.taught, key) for key, name in ON_TAUGHT.items()}
    return found


def of_answers(scores: Scores) -> dict[str, Figure]:
    """Of responses to a set: means over them, and over their tokens."""
    found = {name: mean(scores.rows[name].mean(0)) for name in OF_ROWS if name in scores.rows}
    rows = scores.rows["length"].shape[1]
    for tokens, names in ((scores.own, ON_OWN), (scores.taught, ON_TAUGHT)):
        if tokens is not None:
            counts = tokens.counts(rows)
            found |= {name: ratio(tokens.sums(key, rows), counts) for key, name in names.items()}
    return found


def diversity(responses: Sequence[Sequence[Sequence[int]]]) -> dict[str, Estimate]:
    """`dist_1` … `dist_4` of the token ids of a set's responses, by seed; the mean over the seeds.

    Each seed is a set of its own: together they would hold each prompt several times.
    """
    found = {}
    for n in DISTINCT:
        seeds = [distinct(rows, n) for rows in responses]
        limits = ((one.value, one.low, one.high) for one in seeds)
        found[f"dist_{n}"] = Estimate(*(float(np.mean(part)) for part in zip(*limits, strict=True)))
    return found


def of_text(tokens: Tokens) -> dict[str, Figure]:
    """`perplexity`: exp of the mean −log q over a text's tokens."""
    rows = len(tokens.lengths)
    nats = ratio(tokens.sums("nll", rows), tokens.counts(rows))
    return {"perplexity": lambda weights: np.exp(nats(weights))}


def of_choices(tokens: Tokens, questions: ChoiceSet) -> dict[str, Figure]:
    """`accuracy` of the likeliest choice, and the expected calibration error `ece` of its probability (Guo et al. 2017,
    arXiv 1706.04599, 15 bins of equal width); a choice's probability is that of its tokens, among the choices."""
    right, confidence = judged(tokens, questions)
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gap = np.zeros((len(right), _BINS))
    gap[np.arange(len(right)), place] = right - confidence
    return {
        "accuracy": mean(right),
        "ece": lambda weights: np.abs(weights @ gap).sum(1) / weights.sum(1),
    }


def judged(tokens: Tokens, questions: ChoiceSet) -> tuple[Float[ndarray, " rows"], Float[ndarray, " rows"]]:
    """Whether each question's likeliest choice is right, 1 or 0, and its probability among the choices."""
    log_probs = -tokens.sums("nll", len(tokens.lengths))
    right, confidence = [], []
    for first, count, answer in zip(questions.first, questions.counts, questions.answers, strict=True):
        choices = log_probs[first : first + count]
        probabilities = np.exp(choices - choices.max())
        probabilities /= probabilities.sum()
        right.append(float(probabilities.argmax() == answer))
        confidence.append(float(probabilities.max()))
    return np.array(right), np.array(confidence)


def curves(scores: Scores) -> dict[str, Any]:
    """By position l = 1 … L of a response: mean KLs and ExAccErr, over the rows that reach it.

    ExAccErr(l) = (R(l) − lε(l)) / lε(l) in percent: R(l) = Σ_{t≤l} KL(p‖q) after the model's own prefixes, lε(l) the
    same after the teacher's (MiniLLM, Section 3.3, after Arora et al. 2022, arXiv 2204.01171).
    """
    if scores.own is None or scores.taught is None:
        return {}
    own, taught = scores.own.by_position("forward_kl"), scores.taught.by_position("forward_kl")
    reverse = scores.own.by_position("reverse_kl")
    longest = min(_reached(own), _reached(taught))
    if not longest:
        return {}
    regret, error = (np.nanmean(of[:, :longest], 0).cumsum() for of in (own, taught))
    excess = np.divide(100 * (regret - error), error, out=np.zeros_like(error), where=error > 0)
    return {
        "forward_kl_after_own": np.nanmean(own[:, :longest], 0).tolist(),
        "forward_kl_after_teachers": np.nanmean(taught[:, :longest], 0).tolist(),
        "reverse_kl_after_own": np.nanmean(reverse[:, :longest], 0).tolist(),
        "excess_accumulated_error": excess.tolist(),
        "rows": (~np.isnan(own[:, :longest])).sum(0).tolist(),
    }


def _reached(values: Float[ndarray, "rows longest"]) -> int:
    """Positions that enough rows have."""
    enough = (~np.isnan(values)).sum(0) >= min(_FEWEST_ROWS, len(values))
    return int(enough.argmin()) if not enough.all() else len(enough)
