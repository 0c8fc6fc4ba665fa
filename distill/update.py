"""One optimizer step: forward, loss and backward of every micro-batch, then the update; metrics as sums."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.bad_numbers import GRADIENT, LOSS, REWARD, TEACHER, Sound, Suspects
from distill.data.batches import Rollouts, TokenBatch
from distill.engine import Engine
from distill.objective_settings import MiniLLMSettings
from distill.objectives import LossTerms, Objective
from distill.objectives.chunked import chunks
from distill.objectives.supervised import plain_text_loss
from distill.rollout.diversity import distinct_share
from distill.teacher import FORWARDS, TOKENS, Teacher
from distill.telemetry import Stopwatch
from distill.topology import Topology

Sums = dict[str, Tensor]


class Updater:
    """Applies an objective to a student. One token count divides everything, so no split of the batch matters."""

    def __init__(
        self,
        objective: Objective,
        student: Engine,
        teacher: Teacher | None,
        topology: Topology,
        watch: Stopwatch,
        dropout: bool = True,
    ):
        self.objective, self.student, self.teacher = objective, student, teacher
        self.topology, self.watch = topology, watch
        self.dropout = dropout
        """Whether the student's own dropout is on in steps that score no rollout."""
        self.memory: dict[str, float] = {}
        """What the teacher has read in the run so far, over all ranks; a checkpoint keeps it."""
        self.suspects: Suspects | None = None
        """What was not finite on this rank if the latest step was skipped; the update was, on all ranks alike."""
        self._done: list[tuple[TokenBatch, Sound, bool]] = []
        """This step's micro-batches, what can be trusted of each, and whether the teacher took part."""

    def step(
        self, micro_batches: Sequence[TokenBatch], plain_text: Sequence[TokenBatch], fresh: Rollouts | None = None
    ) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches; every rank brings equally many. Collective.

        Returns the record's figures, the same on every rank, of the round `fresh` too, where one was sampled.
        """
        # A rollout was sampled without dropout. Scored with it, q would be another network's than q_old, and the ratio
        # of the policy gradient would be clipped before the policy has moved.
        sampled = any(isinstance(batch, Rollouts) for batch in micro_batches)
        self.student.train(dropout=self.dropout and not sampled)
        self._done = []
        micro_batches = self.objective.prepare(micro_batches, self.topology.sum_over_replicas)
        tokens = self._count(micro_batches)
        sums: Sums = {}
        for batch in micro_batches:
            with self.watch.phase("forward"):
                terms = self._terms(batch)
            with self.watch.phase("backward"):
                self._accumulate(terms, batch, tokens, asked=self.teacher is not None)
            _add(sums, terms.metrics | {"loss/total": terms.total.detach()}, tokens)
            del terms  # its graph, before the next micro-batch makes one
        if plain_text:
            with self.watch.phase("plain_text"):
                self._plain_text(plain_text, sums)
        learning_rate = self.student.learning_rate
        with self.watch.phase("optimizer"):
            grad_norm = self.student.step()
        _add(sums, _rollout_sums(micro_batches), tokens.new_ones(()))
        if fresh is not None:
            share, rows = distinct_share(fresh.response_ids, fresh.response_lengths)
            _add(sums, {"sum/distinct": share, "sum/with_4_grams": rows}, tokens.new_ones(()))
        if self.teacher:
            _add(sums, self.teacher.take_counts(), tokens.new_ones(()))
        self.suspects = None if math.isfinite(grad_norm) else self._suspects()
        self._done = []
        reduced = self._reduce(sums)
        figures = derive(reduced) | self._passes(reduced)
        return figures | {"optim/grad_norm": grad_norm, "optim/lr": learning_rate, "tokens/response": float(tokens)}

    def _accumulate(self, terms: LossTerms, batch: TokenBatch, tokens: Tensor, asked: bool) -> None:
        """Backward, with a gradient that stops the update if the loss cannot be trusted."""
        sound = Sound.of(terms, batch)
        self._done.append((batch, sound, asked))
        self.student.accumulate(sound.held(terms.total), tokens)

    def _suspects(self) -> Suspects:
        """What was not finite in which of this rank's micro-batches, after a step that was skipped. Collective."""
        found: Suspects = {GRADIENT: [batch for batch, *_ in self._done]}
        for batch, sound, asked in self._done:
            bad = {TEACHER: asked and not self._teacher_is_finite(batch)}
            bad |= {REWARD: not sound.reward, LOSS: not sound.loss}
            for quantity in (name for name, is_so in bad.items() if is_so):
                found.setdefault(quantity, []).append(batch)
        if self.teacher:
            self.teacher.take_counts()  # what it has read again is no work of the run
        return found

    def _teacher_is_finite(self, batch: TokenBatch) -> bool:
        """Whether the teacher's logits are, but for the −inf of what it rules out."""
        assert self.teacher is not None
        batch = self.teacher.known(batch)
        with self.teacher.logits(batch) as logits:
            places = chunks(int(batch.response_lengths.sum()), self.topology.device)
            # The largest is NaN if any is, and −inf where this rank's part of the vocabulary is ruled out.
            return all(bool((logits(tokens).amax(-1) < torch.inf).all()) for tokens in places)

    def _terms(self, batch: TokenBatch) -> LossTerms:
        """The objective on one micro-batch."""
        if self.teacher is None:
            return self.student.loss(batch, lambda student: self.objective.loss(student, None, batch))
        batch = self.teacher.known(batch)
        with self.teacher.logits(batch) as teacher:
            return self.student.loss(batch, lambda student: self.objective.loss(student, teacher, batch))

    def _plain_text(self, batches: Sequence[TokenBatch], sums: Sums) -> None:
        """Add lm_coef · L_PT, a mean over the plain-text tokens of the whole step."""
        settings = getattr(self.objective, "settings", None)
        assert isinstance(settings, MiniLLMSettings)
        assert self.teacher is not None
        tokens = self._count(batches)
        for batch in batches:
            terms = self._plain_text_terms(batch, self.teacher, settings.lm_soft_weight)
            weighted = replace(terms, total=settings.lm_coef * terms.total)
            self._accumulate(weighted, batch, tokens, asked=settings.lm_soft_weight > 0)
            _add(sums, terms.metrics | {"loss/total": weighted.total.detach()}, tokens)

    def _plain_text_terms(self, batch: TokenBatch, teacher: Teacher, soft: float) -> LossTerms:
        targets = batch.response_ids[batch.response_mask]
        if soft == 0:
            return self.student.loss(batch, lambda student: plain_text_loss(student, None, targets, 0.0))
        with teacher.logits(teacher.known(batch)) as logits:
            return self.student.loss(batch, lambda student: plain_text_loss(student, logits, targets, soft))

    def _passes(self, sums: dict[str, float]) -> dict[str, float]:
        """How often the teacher has read each token, over the run."""
        self.memory = {name: self.memory.get(name, 0.0) + sums.get(name, 0.0) for name in (FORWARDS, TOKENS)}
        read = self.memory[TOKENS]
        return {"teacher/forwards_per_token": self.memory[FORWARDS] / read} if read else {}

    def _count(self, batches: Sequence[TokenBatch]) -> Tensor:
        """Response tokens of the whole optimizer step: over all micro-batches and replicas."""
        here = float(sum(int(batch.response_lengths.sum()) for batch in batches))
        return self.topology.sum_over_replicas(torch.tensor(here, device=self.topology.device))

    def _reduce(self, sums: Sums) -> dict[str, float]:
        names = sorted(sums)
        stacked = torch.stack([sums[name].double() for name in names])
        reduced = self.topology.agree_in_replica(self.topology.sum_over_replicas(stacked))
        return dict(zip(names, reduced.tolist(), strict=True))


def derive(sums: dict[str, float]) -> dict[str, float]:
    """Replace sums by the figures they make: means, rates, the weights' effective sample size."""
    figures = {name: value for name, value in sums.items() if not name.startswith("sum/")}
    if rows := sums.get("sum/rows"):
        tokens, weights = sums["sum/tokens"], sums["sum/weights"]
        figures |= {
            "rollout/response_length": tokens / rows,
            "rollout/eos_rate": sums["sum/ended"] / rows,
            "rollout/teacher_share": sums["sum/from_teacher"] / tokens,
            # Kish: (Σw)² / (n Σw²), 1 when all weights are equal.
            "rollout/effective_sample_size": weights**2 / (tokens * sums["sum/squared_weights"]),
        }
        if read := sums.get("sum/student_tokens"):
            figures["rollout/student_forwards_per_token"] = sums["sum/student_forwards"] / read
    if counted := sums.get("sum/with_4_grams"):
        figures["rollout/distinct_4"] = sums["sum/distinct"] / counted
    return figures


def _rollout_sums(micro_batches: Sequence[TokenBatch]) -> Sums:
    sums: Sums = {}
    for batch in micro_batches:
        if isinstance(batch, Rollouts):
            weights = batch.importance_weights
            parts = {
                "rows": batch.response_lengths.new_tensor(len(batch)),
                "tokens": batch.response_lengths.sum(),
                "ended": batch.ended.sum(),
                "from_teacher": batch.from_teacher.sum(),
                "weights": weights.sum(),
                "squared_weights": weights.square().sum(),
            }
            if batch.student_forwards is not None:
                parts |= {"student_forwards": batch.student_forwards.sum(), "student_tokens": parts["tokens"]}
            _add(sums, {f"sum/{name}": value for name, value in parts.items()}, weights.new_ones(()))
    return sums


def _add(sums: Sums, terms: Sums, count: Tensor) -> None:
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + value / count
