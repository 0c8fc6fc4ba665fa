"""Prompts → `Rollouts`: gather both models once, decode in batches of like length, hand back in the caller's order."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from distill.config import RolloutSettings
from distill.data.batches import B, Rollouts, TokenBatch, concatenate
from distill.host import on_host
from distill.models.attention import grouped_attention
from distill.models.packing import packed
from distill.rollout.decode import Randomness, decode
from distill.rollout.ends import Ends
from distill.rollout.gathering import Choice, Gatherable, choose, on_this_rank, over_ranks
from distill.rollout.sampling import coins, token_uniforms
from distill.topology import Topology

Sample = Callable[[TokenBatch, Int[Tensor, " batch"], int], Rollouts]
"""Prompts [B, P], each row's number within the round, which seeds its draws, and the round → one response a prompt."""


class RolloutWorker:
    """Samples responses with the student, mixed with the teacher where there is one.

    With α = 0 a teacher only scores. `keep_hidden` keeps the student's final hidden states beside the teacher's.
    """

    def __init__(
        self,
        student: Gatherable,
        teacher: Gatherable | None,
        settings: RolloutSettings,
        ends: Ends,
        seed: int,
        topology: Topology,
        keep_hidden: bool = False,
    ):
        self.student, self.teacher, self.settings = student, teacher, settings
        self.keep_hidden = keep_hidden
        self.seed, self.topology, self.device = seed, topology, topology.device
        self.ends = ends
        self.choice: Choice | None = None

    def collect(
        self,
        prompts: TokenBatch,
        row_ids: Int[Tensor, " batch"],
        round_index: int,
        progress: Callable[[int], object] = lambda rows: None,
        kept: Bool[Tensor, " batch"] | None = None,
    ) -> Rollouts:
        """One response a prompt, in the order given, on the device. Collective over the ranks.

        Args:
            prompts: this rank's prompts; their responses are ignored.
            row_ids: each row's number within the round over all ranks, which seeds its draws.
            round_index: which round of the run.
            progress: called with the number of rows each time some are finished.
            kept: the rows to hand back, where ranks decode together what only one of them needs; default: all.
        """
        order = prompts.prompt_lengths.argsort(stable=True)
        kept = torch.ones(len(prompts), dtype=torch.bool) if kept is None else kept
        parts: list[Rollouts] = []
        with self.opened() as sample:
            for index in order.split(self.settings.batch):
                rollouts = sample(prompts.rows(index), row_ids[index], round_index)
                progress(len(index))
                mine = kept[index].nonzero().squeeze(1)
                if len(mine) == 0:
                    continue
                if len(mine) < len(index):  # at once: the teacher's hidden states are the largest part of a rollout
                    rollouts = rollouts.rows(mine)
                if self.settings.teacher_cache == "host" and rollouts.teacher_hidden is not None:
                    # Now, so that the device never holds those of a whole round.
                    rollouts = replace(rollouts, teacher_hidden=rollouts.teacher_hidden.cpu())
                parts.append(rollouts)
        return self.place(concatenate(parts).rows(order[kept[order]].argsort()))

    @contextmanager
    def opened(self) -> Iterator[Sample]:
        """Both models ready to sample, one batch of rows after the other. Collective.

        Where layers are fetched one by one so is every call: all ranks must make as many.
        """
        self.student.train(False)
        with ExitStack() as stack, torch.no_grad():
            choice = self.choose_gathering()
            student = self._open(self.student, choice.once, stack)
            teacher = self._open(self.teacher, choice.once, stack) if self.teacher else None

            def sample(prompts: TokenBatch, row_ids: Int[Tensor, " batch"], round_index: int) -> Rollouts:
                rollouts, _ = decode(
                    student,
                    teacher,
                    prompts.to(self.device),
                    self._randomness(row_ids, round_index),
                    self.settings,
                    self.ends,
                    self.student.vocab,
                    self.topology.agree_in_replica,
                    self.keep_hidden,
                    on_this_rank if choice.once else over_ranks(self.topology),
                )
                return rollouts

            yield sample

    def place(self, batch: B) -> B:
        """On the device, but for the teacher's hidden states where `rollout.teacher_cache` wants them on the host."""
        hidden = batch.teacher_hidden
        if hidden is None or self.settings.teacher_cache == "device":
            return batch.to(self.device)
        return replace(replace(batch, teacher_hidden=None).to(self.device), teacher_hidden=on_host(hidden))

    def choose_gathering(self) -> Choice:
        """How the next round's weights will be had, as things stand now. Collective where memory is measured."""
        sharded = [model for model in (self.student, self.teacher) if model]
        choice = choose(self.settings.gather, sum(model.missing_bytes for model in sharded), self.topology)
        news = self.choice is None or choice.once != self.choice.once  # how much is free changes all the time
        if news and self.settings.gather == "auto" and self.topology.is_writer and self.topology.world_size > 1:
            tqdm.write(f"rollout.gather: {'once' if choice.once else 'layer'} ({choice.why})")
        self.choice = choice
        return choice

    def _open(self, model: Gatherable, once: bool, stack: ExitStack) -> PreTrainedModel:
        """The model ready to sample, until the stack closes."""
        opened = stack.enter_context(model.whole() if once else model.by_layer())
        stack.enter_context(grouped_attention(opened))
        if once:
            stack.enter_context(packed(opened))
        return opened

    def _randomness(self, row_ids: Int[Tensor, " batch"], round_index: int) -> Randomness:
        flips = coins(self.settings, self.seed, round_index, row_ids)
        uniforms = token_uniforms(self.settings, self.seed, round_index, row_ids)
        return Randomness(flips.to(self.device), uniforms.to(self.device))
