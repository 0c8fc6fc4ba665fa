"""Optimizer steps in which a number is not finite: named by their cause, counted, their batches kept.

A bad number must stop the update on every rank alike, and only the gradient reaches them all. So a loss that cannot be
trusted is made NaN, and the gradient's norm, which DeepSpeed agrees on before each update, carries the verdict: sound
steps pay neither a collective nor a wait. Only after a skipped step do the ranks tell each other what it was.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.data.batches import Rollouts, TokenBatch
from distill.loss_scale import LossScale
from distill.objectives.terms import LossTerms
from distill.topology import Topology

FOLDER = "faults"
TEACHER, REWARD, LOSS, GRADIENT = "teacher's logits", "reward", "loss", "gradient"
_CAUSES = (TEACHER, REWARD, LOSS, GRADIENT)
"""What is worth naming, the cause before its effects."""
# Batches a rank keeps: enough to see what they share, too few to fill a disk.
_KEPT = 8

Suspects = dict[str, list[TokenBatch]]
"""What was not finite on this rank, in which micro-batches. The gradient, which is of all ranks, is always there."""


class Sound(NamedTuple):
    """What can be trusted of one micro-batch, on the device."""

    reward: Bool[Tensor, ""]
    loss: Bool[Tensor, ""]

    @classmethod
    def of(cls, terms: LossTerms, batch: TokenBatch) -> "Sound":
        """Rewards as the objective takes them, after its clip; what a rollout says of a token may be −inf, not NaN."""
        reward = terms.metrics.get("reward/mean", terms.total.new_zeros(())).isfinite()
        if isinstance(batch, Rollouts):
            said = batch.teacher_logprobs - batch.behavior_logprobs + batch.importance_weights
            reward = reward & ~said.isnan().any()
        return cls(reward, terms.total.detach().isfinite())

    def held(self, total: Tensor) -> Tensor:
        """The same total, or NaN, and NaN all its gradient, if something is wrong."""
        return total * torch.where(self.reward & self.loss, 1.0, torch.nan)


@dataclass(frozen=True)
class Skipped:
    """A step that was skipped; the same on every rank."""

    step: int
    quantity: str
    ranks: list[int]
    """Where it arose; none where no rank can tell."""
    kept: str
    """Where its batches are, or why they are not."""

    def __str__(self) -> str:
        where = ""
        if self.ranks:
            where = f" on rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        verb = "are" if self.quantity == TEACHER else "is"
        return f"step {self.step} skipped: the {self.quantity} {verb} not finite{where}; {self.kept}"


class BadSteps:
    """Counts the skipped steps of a run and keeps their batches under `FOLDER` of its folder."""

    def __init__(self, run: Path, tokenizer: PreTrainedTokenizerBase, topology: Topology, scale: LossScale | None):
        self.folder, self.tokenizer, self.topology, self.scale = run / FOLDER, tokenizer, topology, scale
        self.memory: dict[str, float] = {}
        """The counts; every rank holds the same, and a checkpoint keeps them."""

    def figures(self) -> dict[str, float]:
        """The counts so far, and fp16's loss scale."""
        names = ["skipped_steps", "skipped_in_a_row", *(["overflows"] if self.scale else [])]
        counts = {f"fault/{name}": self.memory.get(name, 0) for name in names}
        return counts | ({"optim/loss_scale": self.scale.value} if self.scale else {})

    @property
    def in_a_row(self) -> int:
        """How many steps have been skipped since the last sound one."""
        return int(self.memory.get("skipped_in_a_row", 0))

    def note(self, step: int, suspects: Suspects | None) -> Skipped | None:
        """Count step `step`, sound if nothing is suspected. Collective where something is.

        Gradients that overflow in fp16 only lower its loss scale: they are counted apart, unless it cannot fall.
        """
        if suspects is None:
            self._count(skipped_in_a_row=-self.in_a_row)
            return None
        found = self.topology.gather_objects(sorted(suspects, key=_CAUSES.index))
        quantity = min((causes[0] for causes in found), key=_CAUSES.index)
        if self.scale and quantity == GRADIENT and self.scale.had_room:
            self._count(overflows=1)
            return None
        if self.scale:
            self.scale.restore()
        self._count(skipped_steps=1, skipped_in_a_row=1)
        outcomes = self.topology.gather_objects(self._keep(step, quantity, suspects.get(quantity, [])))
        ranks = [] if quantity == GRADIENT else [rank for rank, causes in enumerate(found) if quantity in causes]
        return Skipped(step, quantity, ranks, next((text for text in outcomes if text), ""))

    def _count(self, **more: int) -> None:
        self.memory = self.memory | {name: self.memory.get(name, 0) + count for name, count in more.items()}

    def _keep(self, step: int, quantity: str, batches: Sequence[TokenBatch]) -> str:
        """Write this rank's batches; says where, or why not: a full disk must not end a run that can go on."""
        if not batches:
            return ""
        name = f"step-{step:07d}-rank-{self.topology.rank}"
        others = [p for p in self.folder.glob(f"step-*-rank-{self.topology.rank}.safetensors") if p.stem != name]
        if len(others) >= _KEPT:
            return f"{_KEPT} batches of earlier ones are kept in {self.folder}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / f"{name}.safetensors", save(tensors_of(batches)))
            about = {"step": step, "rank": self.topology.rank, "not_finite": quantity, "rows": self._texts(batches)}
            _write(self.folder / f"{name}.json", json.dumps(about, ensure_ascii=False, indent=1).encode())
        except OSError as error:
            return f"its batch could not be kept ({error})"
        return f"its batch is kept in {self.folder}"

    def _texts(self, batches: Sequence[TokenBatch]) -> list[dict[str, object]]:
        rows = [batch.rows([row]) for batch in batches for row in range(len(batch))]
        decode = self.tokenizer.decode
        return [{"prompt": decode(row.prompt_ids[0]), "response": decode(row.response_ids[0])} for row in rows]


def tensors_of(batches: Sequence[TokenBatch]) -> dict[str, Tensor]:
    """The micro-batches' tensors by `NUMBER.NAME`; of hidden states, which are large, only which are finite."""
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        for name, value in batch.tensors().items():
            if name.endswith("_hidden"):
                name, value = f"{name}_is_finite", value.isfinite().all(-1)
            # A copy: the format refuses tensors that share memory.
            tensors[f"{number}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors


def _write(path: Path, content: bytes) -> None:
    """At once: a file of that name is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
