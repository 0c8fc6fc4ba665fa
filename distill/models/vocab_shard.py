"""The part of the vocabulary that this rank's logits stand for, and the sums over all of it.

Under tensor parallelism the lm_head's rows are dealt out, so each rank has the logits of one range of ids. Whatever a
loss wants of the whole vocabulary is a maximum or a sum of one number a token: those are reduced, the logits stay.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import BadInput, Problem

# Devices on which a look at a value waits for nothing.
_SEEN_AT_ONCE = ("cpu",)


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
        """Each row's value at its id where that is one of this rank's, else 0: to be summed over the ranks.

        An id that no rank holds is refused, see `_places`.
        """
        here, column, elsewhere = self._places(values, ids)
        return torch.where(here, values.gather(-1, column[:, None]).squeeze(-1), elsewhere)

    def add_at(
        self, values: Float[Tensor, "n local"], ids: Int[Tensor, " n"], amount: float | Float[Tensor, " n"]
    ) -> Float[Tensor, "n local"]:
        """Add, in place, to each row's value at its id, on the rank that holds it."""
        here, column, elsewhere = self._places(values, ids)
        rows = torch.arange(len(ids), device=ids.device)
        values[rows, column] += torch.where(here, amount, elsewhere).to(values.dtype)
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

    def _places(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each id is this rank's, its column (any where it is not), and the value where another rank holds it.

        That is 0, and NaN where no rank does: an accelerator is not waited for, and a NaN stops the step.

        Raises:
            BadInput: the ids are on the host, and no rank holds one of them. A 0 would pass for log 1, a certain token.
        """
        last = values.shape[-1] - 1
        size = sum(self.widths) or last + 1
        known = (ids >= 0) & (ids < size)
        if ids.device.type in _SEEN_AT_ONCE and not known.all():
            wrong = f"the models know only 0 to {size - 1}"
            raise BadInput(Problem("token id", int(ids[~known][0]), wrong, "find it in the records, and leave it out"))
        column = ids - self.start
        elsewhere = values.new_zeros(len(ids)).masked_fill_(~known, torch.nan)
        return (column >= 0) & (column <= last) & known, column.clamp(0, last), elsewhere


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
