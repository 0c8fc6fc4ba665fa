"""How the ranks' shards of a model become usable for sampling: gathered once, or fetched layer by layer."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from distill.host import free_memory_bytes
from distill.topology import Topology

Together = Callable[[Tensor], Tensor]
"""Elementwise "is this so on any rank?"; all ranks call it alike."""

# What a gathered copy may take of the free memory; caches, logits and packed weights need room too.
_SHARE = 1 / 3


class Gatherable(Protocol):
    """A sharded model that can sample."""

    vocab: int

    @property
    def missing_bytes(self) -> int:
        """What this rank lacks of the whole model."""
        ...

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode."""

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The plain model, every parameter in place. Collective."""
        ...

    def by_layer(self) -> AbstractContextManager[PreTrainedModel]:
        """The model whose every layer is fetched when it is called, by all ranks together. Collective."""
        ...


class Choice(NamedTuple):
    """What was decided, and why in words for the console."""

    once: bool
    why: str


def choose(wanted: Literal["auto", "once", "layer"], missing_bytes: int, topology: Topology) -> Choice:
    """Gather once unless told otherwise, or unless the copy does not fit on some rank. Collective."""
    missing_bytes = int(topology.max_over_ranks(missing_bytes))  # parts need not be equal, the choice must
    if missing_bytes == 0:
        return Choice(True, "every rank holds the whole models")
    if wanted != "auto":
        return Choice(wanted == "once", "as set")
    free = -topology.max_over_ranks(-free_memory_bytes())
    gib = 2**30
    why = f"the missing shards take {missing_bytes / gib:.2f} GiB, the fullest rank has {free / gib:.2f} GiB free"
    once = missing_bytes <= free * _SHARE
    return Choice(once, f"{why}; a copy may take a third")


def on_this_rank(flags: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """`Together` of ranks that need not keep step."""
    return flags


def over_ranks(topology: Topology) -> Together:
    """`Together` over all ranks (one all-reduce)."""

    def any_rank(flags: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        counts = flags.to(topology.device, torch.int32)
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
        return counts.bool().to(flags.device)

    return any_rank
