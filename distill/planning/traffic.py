"""Bytes that one rank sends, by what for.

Of S bytes over n ranks a ring sends (n − 1)/n · S for an all-gather or a reduce-scatter and twice that for an
all-reduce. ZeRO-3 gathers weights for a forward and again for the backward what it let go of between, and scatters the
gradients of every micro-batch (arXiv 1910.02054, section 7); tensor parallelism all-reduces two hidden states a layer
and token forward (arXiv 1909.08053), and under AutoTP one for each column-split matrix backward. Losses are
vocabulary-parallel: ranks reduce a few numbers a token, and the gradient of the final hidden states once.
"""

from dataclasses import dataclass
from typing import Literal

from distill.planning.memory import gathers_once
from distill.planning.setup import Setup
from distill.planning.shapes import ModelShape

# Of a layer's matrices: attention's and the feed-forward's last are split by rows, the others by columns.
_ROW_SPLIT = 2
# fp32 numbers of a token that a vocabulary-parallel loss all-reduces: of both models a maximum and a sum of
# exponentials, and at most four sums, MiniLLM's; divergences have one or two.
_REDUCED, _FP32 = 8, 4

Phase = Literal["rollouts", "loss", "update"]


@dataclass(frozen=True)
class Flow:
    """One kind of traffic."""

    phase: Phase
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
    return sum(flow.sent * (setup.feed.rounds if flow.phase == "rollouts" else 1) for flow in flows)


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
    whole_parts, whole = shape.whole_below(setup.zero.persistence)
    split = _ring(shape.split / shape.tp - whole_parts, setup.replicas_of(shape))
    return setup.item * (split + _ring(shape.replicated - whole, setup.cluster.ranks))


def _gather_head(setup: Setup, shape: ModelShape) -> float:
    part = shape.head_size / shape.tp
    sharded = setup.zero.stage == 3 and part > setup.zero.persistence
    return setup.item * _ring(part, setup.replicas_of(shape)) if sharded else 0.0


def _scatter(setup: Setup) -> float:
    """Sent while the gradients of a backward are summed over the replicas, each rank keeping its part."""
    shape, ranks = setup.student, setup.cluster.ranks if setup.zero.stage == 3 else setup.dp
    return setup.item * (_ring(shape.split / shape.tp, setup.dp) + _ring(shape.replicated, ranks))


def _ring(size: float, ranks: int) -> float:
    return size * (ranks - 1) / ranks


def _rollouts(setup: Setup) -> list[Flow]:
    if not setup.samples:
        return []
    rollout, micro_batch = setup.config.rollout, setup.config.optim.micro_batch
    readers = setup.models() if setup.mixes else [setup.student]
    batches = -(-setup.decoded // rollout.batch)
    if gathers_once(setup):
        weights = sum(_gather(setup, shape) for shape in readers)
    else:
        weights = sum(
            _gather_head(setup, shape) + batches * forwards * (_gather(setup, shape) - _gather_head(setup, shape))
            for shape, forwards in zip(readers, reads(setup), strict=False)
        )
    flows = [Flow("rollouts", "weights for sampling", weights, "replicas")]
    if setup.teacher and not setup.mixes:
        flows += _reading("rollouts", setup, -(-setup.rows // micro_batch), setup.prompt + rollout.max_new_tokens)
    if setup.feed.paired:
        flows += _reading("rollouts", setup, -(-setup.feed.paired // setup.dp // micro_batch), setup.length)
    # Sampling switches ZeRO-3's hooks off and on: in its first backward after that it does not know what to keep.
    flows.append(Flow("rollouts", "weights, order not known", _gather(setup, setup.student), "replicas"))
    tokens = setup.decoded * (setup.prompt + rollout.max_new_tokens - 1)
    hidden = sum(_forward_states(setup, shape, tokens) for shape in readers)
    drawn = setup.decoded * rollout.max_new_tokens
    logits = setup.item * sum(_ring(shape.vocab * drawn, shape.tp) for shape in readers)
    return [*flows, Flow("rollouts", "hidden states", hidden, "replica"), Flow("rollouts", "logits", logits, "replica")]


def _forward_states(setup: Setup, shape: ModelShape, tokens: float) -> float:
    """All-reduces of a tensor-parallel forward."""
    return 2 * setup.item * _ring(_ROW_SPLIT * shape.layers * shape.hidden * tokens, shape.tp)


def _reading(phase: Phase, setup: Setup, micro_batches: float, length: int) -> list[Flow]:
    """The teacher's forwards over so many of a rank's micro-batches, each with those of the ranks it is shared with."""
    assert setup.teacher
    rows = micro_batches * setup.config.optim.micro_batch * setup.cohort
    weights = micro_batches * _gather(setup, setup.teacher)
    states = _forward_states(setup, setup.teacher, rows * length)
    return [
        Flow(phase, "weights for the teacher's reading", weights, "replicas"),
        Flow(phase, "hidden states of the teacher's reading", states, "replica"),
    ]


def _loss(setup: Setup) -> list[Flow]:
    count = setup.micro_batches + setup.plain_micro_batches
    local = setup.student.on_rank
    # What is used again within `max_reuse` parameters stays: twice its distance from the end of the forward.
    let_go = max(local - setup.zero.max_reuse / 2, 0) / local
    flows = [Flow("loss", "weights", count * (1 + let_go) * _gather(setup, setup.student), "replicas")]
    if setup.zero.stage > 1:
        flows.append(_gradients(setup, count))
    if setup.teacher:
        flows += _teacher_in_loss(setup)
    return [*flows, *_tensor_parallel_loss(setup, count)]


def _tensor_parallel_loss(setup: Setup, count: int) -> list[Flow]:
    """Each layer's all-reduces, one of the states' gradient at the head, and the loss's numbers of each token."""
    student = setup.student
    tokens = count * setup.config.optim.micro_batch * setup.length
    # Plain text is answered from its first token on.
    answered = setup.config.optim.micro_batch * (
        setup.micro_batches * setup.answered + setup.plain_micro_batches * setup.length
    )
    layers, linears = student.layers, student.linears
    forwards = 2 if setup.config.student.gradient_checkpointing else 1
    reductions = forwards * _ROW_SPLIT * layers + linears - _ROW_SPLIT * layers
    hidden = (reductions * tokens + answered) * student.hidden
    return [
        Flow("loss", "hidden states", 2 * setup.item * _ring(hidden, student.tp), "replica"),
        Flow("loss", "sums over the vocabulary", 2 * _FP32 * _ring(_REDUCED * answered, student.tp), "replica"),
    ]


def _gradients(setup: Setup, count: int) -> Flow:
    """Stage 3 scatters them, stage 2 all-reduces each bucket and keeps a part of it."""
    return Flow("loss", "gradients", count * _scatter(setup) * (1 if setup.zero.stage == 3 else 2), "replicas")


def _teacher_in_loss(setup: Setup) -> list[Flow]:
    """Its head for every micro-batch it takes part in, made whole for a student that is; and all of it where its states
    do not come with a round."""
    assert setup.teacher
    feed, teacher = setup.feed, setup.teacher
    plain = setup.plain_micro_batches if feed.plain_read else 0
    count = setup.micro_batches + plain
    whole = setup.item * count * _ring(teacher.head_size, teacher.tp) if setup.cohort > 1 else 0.0
    read = feed.read * setup.micro_batches + plain
    return [
        Flow("loss", "teacher's head", count * _gather_head(setup, teacher), "replicas"),
        Flow("loss", "teacher's head made whole", whole, "replica"),
        *_reading("loss", setup, read, setup.length),
    ]


def _update(setup: Setup) -> list[Flow]:
    stage = setup.zero.stage
    if stage == 3:
        # What is too small to shard.
        parts, others = setup.student.whole_below(setup.zero.persistence)
        whole = setup.item * (_ring(parts, setup.dp) + _ring(others, setup.cluster.ranks))
        return [Flow("update", "small weights", whole, "replicas")]
    flows = [Flow("update", "gradients", 2 * _scatter(setup), "replicas")] if stage < 2 else []
    weights = setup.item * _ring(setup.student.on_rank, setup.dp) if stage else 0.0
    return [*flows, Flow("update", "weights", weights, "replicas")]
