"""How well samples fit the distribution they should come from."""

from collections import Counter

import torch


def chi_square(observed: list[float], expected: list[float]) -> float:
    """Probability of a fit as bad as this or worse: the chi-square survival function at len − 1 degrees of freedom."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    half = torch.tensor([(len(observed) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def p_value(seen: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square of the counts; cells expected fewer than 5 times are pooled."""
    counts = Counter(seen)
    assert all(expected.get(sequence, 0) > 0 for sequence in counts), "a sequence of probability 0 was drawn"
    big = [sequence for sequence, probability in expected.items() if probability * len(seen) >= 5]
    observed = [counts[sequence] for sequence in big]
    wanted = [expected[sequence] * len(seen) for sequence in big]
    if len(seen) - sum(wanted) > 1e-6:
        observed.append(len(seen) - sum(observed))
        wanted.append(len(seen) - sum(wanted))
    if len(observed) == 1:
        return 1.0
    return chi_square(observed, wanted)
