"""Distinct n-grams counted at once for all rows, against sets of tuples."""

import pytest
import torch

from distill.evaluation.text import repetition
from distill.rollout.diversity import distinct_share


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("vocab", [2, 7, 150_000])
def test_it_is_what_repetition_leaves(n: int, vocab: int) -> None:
    g = torch.Generator().manual_seed(vocab)
    ids = torch.randint(vocab, (20, 40), generator=g)
    lengths = torch.randint(1, 41, (20,), generator=g)
    share, rows = distinct_share(ids, lengths, n)
    expected = [
        1 - repetition(row[:length], n)
        for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)
        if length >= n
    ]
    assert int(rows) == len(expected)
    assert float(share) == pytest.approx(sum(expected), abs=1e-12)


@pytest.mark.parametrize("width", [1, 3, 9])
def test_responses_too_short_for_any_count_for_nothing(width: int) -> None:
    share, rows = distinct_share(torch.ones(3, width, dtype=torch.long), torch.tensor([1, 1, 1]))
    assert (float(share), int(rows)) == (0.0, 0)


def test_ids_beyond_a_response_count_for_nothing() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1]])
    share, rows = distinct_share(ids, torch.tensor([4, 6]))
    assert (float(share), int(rows)) == (1 + 1 / 3, 2)
