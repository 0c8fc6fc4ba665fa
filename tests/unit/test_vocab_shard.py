"""Values at token ids, with the vocabulary on one rank and on two: known answers, and ids that no rank holds."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from over_logits import sum_over_logits
from torch import Tensor

from distill.errors import BadInput
from distill.models import vocab_shard
from distill.models.vocab_shard import WHOLE, VocabShard
from distill.objectives.supervised import soft_and_hard_cross_entropy

WIDTHS = (5, 5)
LOGITS = torch.randn(3, sum(WIDTHS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KNOWN, UNKNOWN = torch.tensor([1, 7, 9]), torch.tensor([1, 7, 11])


def on_two_ranks(work: Callable[[VocabShard, slice], Tensor]) -> list[Tensor | BadInput]:
    """What each of two gloo ranks makes of its part of the vocabulary, or how it refuses."""
    store = dist.HashStore()

    def rank(index: int) -> Tensor | BadInput:
        shard = VocabShard(WIDTHS, index, dist.ProcessGroupGloo(store, index, len(WIDTHS)))
        try:
            return work(shard, slice(shard.start, shard.stop))
        except BadInput as error:
            return error

    with ThreadPoolExecutor(len(WIDTHS)) as ranks:
        return list(ranks.map(rank, range(len(WIDTHS))))


def cross_entropy(logits: Tensor, targets: Tensor, shard: VocabShard) -> Tensor:
    """Its value and gradient, as SFT takes them."""
    logits = logits.clone().requires_grad_()
    total, _ = soft_and_hard_cross_entropy(lambda evaluate: sum_over_logits(logits, evaluate, shard), None, targets, 0)
    (gradient,) = torch.autograd.grad(total, logits)
    return torch.cat([total.detach().view(1), gradient.flatten()])


def by_loop(targets: list[int]) -> tuple[float, list[list[float]]]:
    """The same of the whole vocabulary, token by token: −log of a softmax, and q − onehot."""
    value, gradient = 0.0, []
    for row, target in zip(LOGITS.tolist(), targets, strict=True):
        q = [math.exp(z) / sum(map(math.exp, row)) for z in row]
        value -= math.log(q[target])
        gradient.append([p - (index == target) for index, p in enumerate(q)])
    return value, gradient


def test_known_ids_have_the_values_of_a_loop_over_the_whole_vocabulary() -> None:
    value, gradient = by_loop(KNOWN.tolist())
    parts = on_two_ranks(lambda shard, columns: cross_entropy(LOGITS[:, columns], KNOWN, shard))
    for index, part in enumerate(parts):
        assert part[0] == pytest.approx(value, abs=1e-12)
        mine = [row[5 * index : 5 * index + 5] for row in gradient]
        torch.testing.assert_close(part[1:].view(3, 5), torch.tensor(mine, dtype=torch.float64), rtol=0, atol=1e-12)
    whole = cross_entropy(LOGITS, KNOWN, WHOLE)
    assert whole[0] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("unknown", [11, 10, -1])
def test_an_id_that_no_rank_holds_is_refused_by_name_on_all(unknown: int) -> None:
    """On two ranks it would be 0 on both, the logarithm of a token that is certain; on one an error without a name."""
    targets = torch.tensor([1, 7, unknown])
    found = on_two_ranks(lambda shard, columns: cross_entropy(LOGITS[:, columns], targets, shard))
    found += on_two_ranks(lambda shard, columns: shard.at(LOGITS[:, columns], targets))
    for error in found:
        assert isinstance(error, BadInput), error
        assert f"token id = {unknown}: the models know only 0 to 9; find it in the records" in str(error)
    for refused in (lambda: cross_entropy(LOGITS, targets, WHOLE), lambda: WHOLE.add_at(LOGITS.clone(), targets, 1.0)):
        with pytest.raises(BadInput, match=f"token id = {unknown}: the models know only 0 to 9"):
            refused()


def test_where_ids_cannot_be_looked_at_they_make_the_step_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator's are not waited for: a loss that is NaN is skipped, and its batch kept."""
    monkeypatch.setattr(vocab_shard, "_SEEN_AT_ONCE", ())
    for parts in (
        on_two_ranks(lambda shard, columns: shard.at(LOGITS[:, columns], UNKNOWN)),
        [WHOLE.at(LOGITS, UNKNOWN)],
    ):
        assert sum(part[:2] for part in parts).tolist() == pytest.approx([LOGITS[0, 1].item(), LOGITS[1, 7].item()])
        assert all(bool(part[2].isnan()) for part in parts)
    added = on_two_ranks(lambda shard, columns: shard.add_at(torch.zeros(3, 5), UNKNOWN, 2.0))
    assert torch.cat(added, 1)[:2].nonzero().tolist() == [[0, 1], [1, 7]]
    assert all(bool(part[2].isnan().any()) for part in added)
    losses = on_two_ranks(lambda shard, columns: cross_entropy(LOGITS[:, columns], UNKNOWN, shard))
    assert all(bool(part[0].isnan()) for part in losses)
