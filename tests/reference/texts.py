"""Rouge-L (Lin 2004) over stemmed words, and repetition of 4-grams."""

import re

from nltk.stem.porter import PorterStemmer

_STEMMER = PorterStemmer()


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits; those of more than three letters are stemmed."""
    found = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
    return [_STEMMER.stem(word) if len(word) > 3 else word for word in found]


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Its length, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def rouge_l(text: str, references: list[str]) -> float:
    """F-measure × 100, the best over the references."""
    best, said = 0.0, words(text)
    for reference in references:
        wanted = words(reference)
        common = longest_common_subsequence(said, wanted)
        if common:
            precision, recall = common / len(said), common / len(wanted)
            best = max(best, 200 * precision * recall / (precision + recall))
    return best


def repetition(ids: list[int]) -> float:
    """The share of 4-grams that stood in the response before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
