"""The part of the vocabulary that this rank's logits stand for, and the sums over all of it.

Under tensor parallelism the lm_head's rows are dealt out, so each rank has the logits of one range of ids. Whatever a
loss wants of the whole vocabulary is a maximum or a sum of one number a token: those are reduced, the logits stay.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Of ids dealt out in ranges of `widths`, one a rank of `group`, range number `index`. Without a group, all ids."""

    widths: tuple[int, ...] = ()
    index: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def start(self) -> int:
        """The first of this rank's ids."""
        return sum(self.widths[: self.index])

    @property
    def stop(self) -> int:
        """One past the last, where they are dealt out."""
        return sum(self.widths[: self.index + 1])

    def sum(self, *partial: Float[Tensor, " n"]) -> list[Tensor]:
        """Sums over the whole vocabulary from each rank's own: one all-reduce for all of them."""
        if self.group is None:
            return list(partial)
        together = torch.stack(partial)
        dist.all_reduce(together, group=self.group)
        return list(together)

    def log_softmax(self, *logits: Float[Tensor, "n local"]) -> list[Tensor]:
        """log softmax over the whole vocabulary, at this rank's ids: two all-reduces for all models' logits together,
        of their maxima and of the sums of their exponentials."""
        if self.group is None:
            return [z.log_softmax(-1) for z in logits]
        top = torch.stack([z.amax(-1) for z in logits])
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        shifted = [z - of[:, None] for z, of in zip(logits, top, strict=True)]
        totals = self.sum(*(z.exp().sum(-1) for z in shifted))
        return [z.sub_(total.log()[:, None]) for z, total in zip(shifted, totals, strict=True)]

    def at(self, values: Float[Tensor, "n local"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Each row's value at its id where that is one of this rank's, else 0: to be summed over the ranks."""
        here, column = self._columns(values, ids)
        found = values.gather(-1, column[:, None]).squeeze(-1)
        return found if self.group is None else torch.where(here, found, 0.0)

    def add_at(
        self, values: Float[Tensor, "n local"], ids: Int[Tensor, " n"], amount: float | Float[Tensor, " n"]
    ) -> Float[Tensor, "n local"]:
        """Add, in place, to each row's value at its id, on the rank that holds it."""
        here, column = self._columns(values, ids)
        rows = torch.arange(len(ids), device=ids.device)
        values[rows, column] += amount if self.group is None else here.to(values.dtype) * amount
        return values

    def gather(self, logits: Float[Tensor, "*n local"]) -> Float[Tensor, "*n vocab"]:
        """Whole logits from every rank's own of the same tokens, to sample from: one all-gather. No gradient."""
        if self.group is None:
            return logits
        return gather_along(logits, self.widths, self.group, -1)

    def require_whole(self, name: str) -> None:
        """Refuse a loss that orders the vocabulary.

        Raises:
            ValueError: it is dealt out; the doctor says so before.
        """
        if self.group is not None:
            raise ValueError(f"{name} orders the whole vocabulary, of which this rank has a part")

    def _columns(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each id is this rank's, and its column; any column where it is not."""
        if self.group is None:
            return ids, ids
        column = ids - self.start
        last = values.shape[-1] - 1
        return (column >= 0) & (column <= last), column.clamp(0, last)


def gather_along(
    part: Float[Tensor, "..."], sizes: tuple[int, ...], group: dist.ProcessGroup, axis: int
) -> Float[Tensor, "..."]:
    """Every rank's part put together along an axis, of which each has its `sizes`: one all-gather."""
    # Equally large, as the collective wants them.
    missing = max(sizes) - part.shape[axis]
    shape = list(part.shape)
    shape[axis] = missing
    mine = torch.cat([part, part.new_zeros(shape)], axis) if missing else part.contiguous()
    everyone = mine.new_empty(len(sizes) * mine.numel())
    dist.all_gather_into_tensor(everyone, mine.view(-1), group=group)
    parts = everyone.view(len(sizes), *mine.shape)
    if axis == 0 and len(set(sizes)) == 1:
        return parts.flatten(0, 1)  # there already: no second copy of a head
    return torch.cat([of.narrow(axis, 0, size) for of, size in zip(parts, sizes, strict=True)], axis)


WHOLE = VocabShard()
"""All ids on this rank: nothing is reduced."""
