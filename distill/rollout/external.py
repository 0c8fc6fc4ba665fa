"""Rollouts of the student alone, sampled by another engine; the teacher reads them afterwards, each token once."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import RolloutSettings
from distill.data.batches import Rollouts, TokenBatch, concatenate, pad_rows
from distill.errors import BadInput, Problem
from distill.rollout.ends import Ends
from distill.rollout.follower import Follower, Scores
from distill.rollout.gathering import Gatherable, Together, on_this_rank, over_ranks
from distill.rollout.sampling import request_seeds
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology

# Rows of the first round that the student scores itself, and the mean difference in nats at which it is not the same
# model. Kernels that round bf16 differently are apart by some hundredths.
_COMPARED, _TOLERANCE = 8, 0.2


class Sampled(NamedTuple):
    """One response as the engine gives it."""

    ids: list[int]
    """What ended it included."""
    logprobs: list[float]
    """Of each token under the untempered model."""
    ended: bool
    """Whether the engine found an end, rather than the length limit."""


class SamplingEngine(Protocol):
    """Samples from weights that it was handed."""

    def push(self, student: PreTrainedModel) -> None:
        """Take over the weights of the whole student."""

    def generate(self, prompts: TokenBatch, seeds: Sequence[int]) -> list[Sampled]:
        """One response a prompt, in order; a row's draws depend on its seed."""
        ...


class ExternalWorker(RolloutWorker):
    """Gives the rollouts that a `RolloutWorker` gives at α = 0, from `engine`. No tensor parallelism.

    The engine takes the student's whole weights, so these are gathered even where `rollout.gather: auto` fetches the
    teacher's layer by layer.
    """

    def __init__(
        self,
        student: Gatherable,
        teacher: Gatherable | None,
        settings: RolloutSettings,
        ends: Ends,
        seed: int,
        topology: Topology,
        engine: SamplingEngine,
    ):
        super().__init__(student, teacher, settings, ends, seed, topology)
        self.engine, self._compared = engine, False

    @torch.no_grad()
    def collect(
        self,
        prompts: TokenBatch,
        row_ids: Int[Tensor, " batch"],
        round_index: int,
        progress: Callable[[int], object] = lambda rows: None,
        kept: Bool[Tensor, " batch"] | None = None,
    ) -> Rollouts:
        """One response a prompt, in the order given, on the device. Collective over the ranks.

        Raises:
            BadInput: in the first round, if the engine's model is not the student.
        """
        assert kept is None or bool(kept.all()), "beside this engine no ranks decode together"
        # The weights have changed since the last round, or there was none.
        with self.student.whole() as whole:
            self.engine.push(whole)
        seeds = request_seeds(self.seed, round_index, row_ids)
        rollouts = self._rollouts(prompts, self.engine.generate(prompts, seeds))
        if not self._compared:
            self._compare(rollouts)
        if self.teacher:
            rollouts = self._read(self.teacher, rollouts, progress)
        else:
            progress(len(rollouts))
        return self.place(rollouts)

    def _rollouts(self, prompts: TokenBatch, sampled: Sequence[Sampled]) -> Rollouts:
        """On the device, cut where a response ends; nothing of the teacher yet."""
        width = max(len(row.ids) for row in sampled)
        ids = pad_rows([torch.tensor(row.ids) for row in sampled], width).to(self.device)
        logprobs = pad_rows([torch.tensor(row.logprobs, dtype=torch.float32) for row in sampled], width)
        lengths = torch.tensor([len(row.ids) for row in sampled], device=self.device)
        found = _first_end(ids, lengths, self.ends)
        whole = replace(
            prompts.to(self.device), response_ids=ids, response_lengths=torch.where(found > 0, found, lengths)
        )
        mask = whole.response_mask
        return Rollouts(
            prompt_ids=whole.prompt_ids,
            prompt_lengths=whole.prompt_lengths,
            response_ids=ids * mask,
            response_lengths=whole.response_lengths,
            behavior_logprobs=logprobs.to(self.device) * mask,
            teacher_logprobs=torch.zeros(mask.shape, device=self.device),
            importance_weights=mask.float(),
            from_teacher=torch.zeros_like(mask),
            ended=(found > 0) | torch.tensor([row.ended for row in sampled], device=self.device),
        ).rows(slice(None))

    def _read(self, teacher: Gatherable, rollouts: Rollouts, progress: Callable[[int], object]) -> Rollouts:
        """With the teacher's scores and hidden states: batches of like length, a forward each."""
        order = rollouts.response_lengths.argsort(stable=True)
        parts: list[Rollouts] = []
        once = self.choose_gathering().once
        # Layer by layer the ranks need each other's shards: all have as many rows, and so as many forwards.
        together = on_this_rank if once else over_ranks(self.topology)
        with ExitStack() as stack:
            model = self._open(teacher, once, stack)
            for index in order.split(self.settings.batch):
                parts.append(self._scored(rollouts.rows(index), model, together))
                progress(len(index))
        return concatenate(parts).rows(order.argsort())

    def _scored(self, rollouts: Rollouts, teacher: PreTrainedModel, together: Together) -> Rollouts:
        scores, mask = self._scores(teacher, rollouts, keep_hidden=True, together=together), rollouts.response_mask
        assert scores.hidden is not None
        # Now, so that the device never holds those of a whole round.
        hidden = scores.hidden.cpu() if self.settings.teacher_cache == "host" else scores.hidden
        return replace(
            rollouts,
            teacher_logprobs=torch.where(mask, scores.logprobs, 0.0),
            teacher_hidden=hidden,
            teacher_forwards=(scores.reads * mask).sum(1),
        )

    def _scores(
        self, model: PreTrainedModel, rollouts: Rollouts, keep_hidden: bool, together: Together = on_this_rank
    ) -> Scores:
        # Nothing more will be drawn: cache and buffers as wide as what is there.
        settings = self.settings.model_copy(update={"max_new_tokens": rollouts.response_ids.shape[1]})
        follower = Follower(model, rollouts, settings, self.student.vocab, keep_hidden, together)
        return follower.finish(rollouts.response_ids, rollouts.response_lengths)

    def _compare(self, rollouts: Rollouts) -> None:
        """Let the student itself score a few rows: the same on all ranks, so that none is left waiting."""
        self._compared = True
        few = rollouts.rows(slice(0, _COMPARED))
        mask = few.response_mask
        self.student.train(False)
        with ExitStack() as stack:
            own = self._scores(self._open(self.student, True, stack), few, keep_hidden=False).logprobs
        off = self.topology.max_over_ranks(float((own - few.behavior_logprobs)[mask].abs().mean()))
        if not off < _TOLERANCE:
            wrong = f"its log-probabilities are {off:.2f} nats a token away from the student's own"
            raise BadInput(Problem("rollout.engine", self.settings.engine, wrong, "give builtin for this model"))


def _first_end(ids: Int[Tensor, "batch response"], lengths: Int[Tensor, " batch"], ends: Ends) -> Int[Tensor, " batch"]:
    """How long each response is up to the first token that ends it; 0 where none does.

    Engines stop at the same ids. With which token a text is complete, each sees its own way.
    """
    found = torch.zeros_like(lengths)
    rows = torch.arange(len(ids), device=ids.device)
    for length in range(1, ids.shape[1] + 1):
        now = ends(ids[:, :length], rows) & (found == 0) & (length <= lengths)
        found = torch.where(now, length, found)
    return found
