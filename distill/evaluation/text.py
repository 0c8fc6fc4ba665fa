"""Measures of generated text."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from distill.evaluation.statistics import Estimate, jackknife

# What a sentence may begin and end with and mean the same; not what a number or a name may.
_AROUND = " .,;:!?\"'“”‘’"


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure × 100, stemmed, the best over the references."""
    return 100 * max(_scorer().score(reference, text)["rougeL"].fmeasure for reference in references)


def exact_match(text: str, references: Sequence[str]) -> float:
    """100 if the text is one of the references but for case, white space and the marks around it, else 0."""
    said = _bare(text)
    return 100.0 * (said != "" and said in map(_bare, references))


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(_AROUND).casefold()


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same response, in [0, 1]; 0 for one too short to have two."""
    grams = _grams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(responses: Sequence[Sequence[int]], n: int) -> Estimate:
    """Dist-n: distinct n-grams of tokens over all n-grams, of a whole set; with a jackknife interval. 0 without any.

    It falls as a set grows, so only sets of one size compare (Li et al. 2016, arXiv 1510.03055).
    """
    rows = [Counter(_grams(tokens, n)) for tokens in responses]
    together: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        together.update(row)
    total = together.total()
    if not total:
        return Estimate(0.0, 0.0, 0.0)
    alone = np.array([sum(together[gram] == count for gram, count in row.items()) for row in rows])
    left = np.array([total - row.total() for row in rows])
    without = (len(together) - alone) / np.maximum(left, 1)
    return jackknife(len(together) / total, without)


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
