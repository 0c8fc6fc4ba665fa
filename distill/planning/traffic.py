"""Bytes that one rank sends, by what for.

Of S bytes over n ranks a ring sends (n − 1)/n · S for an all-gather or a reduce-scatter and twice that for an
all-reduce. ZeRO-3 gathers weights for a forward and again for the backward what it let go of between, and scatters the
gradients of every micro-batch (arXiv 1910.02054, section 7); tensor parallelism all-reduces two hidden states a layer
and token forward (arXiv 1909.08053), and under AutoTP one for each column-split matrix backward.
"""

from dataclasses import dataclass
from typing import Literal

from distill.objective_settings import MiniLLMSettings
from distill.planning.memory import gathers_once
from distill.planning.setup import Setup
from distill.planning.shapes import ModelShape

# Of a layer's matrices: attention's and the feed-forward's last are split by rows, the others by columns.
_ROW_SPLIT = 2


@dataclass(frozen=True)
class Flow:
    """One kind of traffic."""

    phase: Literal["rollouts", "loss", "update"]
    """Of a round, or of an optimizer step."""
    name: str
    sent: float
    """Bytes that a rank sends."""
    within: Literal["replica", "replicas"]
    """Whose ranks: a replica's tensor-parallel ones, or all replicas."""


def traffic_of(setup: Setup) -> list[Flow]:
    """All flows of a round and of an optimizer step, but for counts and metrics of a few bytes."""
    flows = [*_rollouts(setup), *_loss(setup), *_update(setup)]
    return [flow for flow in flows if flow.sent]


def per_step(setup: Setup, flows: list[Flow]) -> float:
    """Bytes of an optimizer step, its share of a round included."""
    return sum(flow.sent / (setup.steps_per_round if flow.phase == "rollouts" else 1) for flow in flows)


def reads(setup: Setup) -> tuple[float, float]:
    """How many forwards student and teacher make for one batch of rollouts: each where a coin names it, the teacher
    once more to score the rest."""
    rollout = setup.config.rollout
    share = rollout.alpha if setup.mixes else 0.0
    if rollout.coins == "per_row" and share:
        return float(rollout.max_new_tokens), float(rollout.max_new_tokens)
    return (1 - share) * rollout.max_new_tokens, share * rollout.max_new_tokens + 1 if setup.mixes else 0.0


def _gather(setup: Setup, shape: ModelShape) -> float:
    """Sent while every rank gets what it lacks of a model."""
    if setup.zero.stage < 3:
        return 0.0
    whole_parts, whole = shape.whole_below(setup.zero.persistence, setup.tp)
    split = _ring(shape.split / setup.tp - whole_parts, setup.dp)
    return setup.item * (split + _ring(shape.replicated - whole, setup.cluster.ranks))


def _gather_head(setup: Setup, shape: ModelShape) -> float:
    part = shape.head_size / setup.tp
    sharded = setup.zero.stage == 3 and part > setup.zero.persistence
    return setup.item * _ring(part, setup.dp) if sharded else 0.0


def _scatter(setup: Setup) -> float:
    """Sent while the gradients of a backward are summed over the replicas, each rank keeping its part."""
    shape, ranks = setup.student, setup.cluster.ranks if setup.zero.stage == 3 else setup.dp
    return setup.item * (_ring(shape.split / setup.tp, setup.dp) + _ring(shape.replicated, ranks))


def _ring(size: float, ranks: int) -> float:
    return size * (ranks - 1) / ranks


def _rollouts(setup: Setup) -> list[Flow]:
    if not setup.samples:
        return []
    rollout = setup.config.rollout
    readers = setup.models() if setup.mixes else [setup.student]
    batches = -(-setup.rows // rollout.batch)
    if gathers_once(setup):
        weights = sum(_gather(setup, shape) for shape in readers)
    else:
        weights = sum(
            _gather_head(setup, shape) + batches * forwards * (_gather(setup, shape) - _gather_head(setup, shape))
            for shape, forwards in zip(readers, reads(setup), strict=False)
        )
    flows = [Flow("rollouts", "weights for sampling", weights, "replicas")]
    if setup.teacher and not setup.mixes:
        again = -(-setup.rows // setup.config.optim.micro_batch) * _gather(setup, setup.teacher)
        flows.append(Flow("rollouts", "weights for the teacher's reading", again, "replicas"))
    # Sampling switches ZeRO-3's hooks off and on: in its first backward after that it does not know what to keep.
    flows.append(Flow("rollouts", "weights, order not known", _gather(setup, setup.student), "replicas"))
    if setup.tp > 1:
        tokens = setup.rows * (setup.prompt + rollout.max_new_tokens - 1)
        hidden = sum(2 * shape.layers * shape.hidden for shape in readers) * tokens
        logits = sum(shape.vocab for shape in readers) * setup.rows * rollout.max_new_tokens
        flows.append(Flow("rollouts", "hidden states", 2 * setup.item * _ring(hidden, setup.tp), "replica"))
        flows.append(Flow("rollouts", "logits", setup.item * _ring(logits, setup.tp), "replica"))
    return flows


def _loss(setup: Setup) -> list[Flow]:
    count = setup.micro_batches + setup.plain_micro_batches
    local = setup.on_rank(setup.student)
    # What is used again within `max_reuse` parameters stays: twice its distance from the end of the forward.
    let_go = max(local - setup.zero.max_reuse / 2, 0) / local
    flows = [Flow("loss", "weights", count * (1 + let_go) * _gather(setup, setup.student), "replicas")]
    if setup.zero.stage > 1:
        flows.append(_gradients(setup, count))
    if setup.teacher:
        flows.append(Flow("loss", "teacher's weights", _teacher_reads(setup), "replicas"))
    if setup.tp > 1:
        tokens = count * setup.config.optim.micro_batch * setup.length
        layers, linears = setup.student.layers, setup.student.linears
        forwards = 2 if setup.config.student.gradient_checkpointing else 1
        reductions = forwards * _ROW_SPLIT * layers + linears - _ROW_SPLIT * layers
        hidden = 2 * setup.item * _ring(reductions * tokens * setup.student.hidden, setup.tp)
        flows.append(Flow("loss", "hidden states", hidden, "replica"))
    return flows


def _gradients(setup: Setup, count: int) -> Flow:
    """Stage 3 scatters them, stage 2 all-reduces each bucket and keeps a part of it."""
    return Flow("loss", "gradients", count * _scatter(setup) * (1 if setup.zero.stage == 3 else 2), "replicas")


def _teacher_reads(setup: Setup) -> float:
    """Its head for every micro-batch, and all of it where its states do not come with rollouts."""
    assert setup.teacher
    objective = setup.config.objective
    sent = setup.micro_batches * _gather_head(setup, setup.teacher)
    if not setup.samples:
        sent += setup.micro_batches * _gather(setup, setup.teacher)
    if isinstance(objective, MiniLLMSettings) and objective.lm_soft_weight:
        sent += setup.plain_micro_batches * (_gather_head(setup, setup.teacher) + _gather(setup, setup.teacher))
    return sent


def _update(setup: Setup) -> list[Flow]:
    stage = setup.zero.stage
    if stage == 3:
        # What is too small to shard.
        parts, others = setup.student.whole_below(setup.zero.persistence, setup.tp)
        whole = setup.item * (_ring(parts, setup.dp) + _ring(others, setup.cluster.ranks))
        return [Flow("update", "small weights", whole, "replicas")]
    flows = [Flow("update", "gradients", 2 * _scatter(setup), "replicas")] if stage < 2 else []
    weights = setup.item * _ring(setup.on_rank(setup.student), setup.dp) if stage else 0.0
    return [*flows, Flow("update", "weights", weights, "replicas")]
