"""Seconds of a step from operations, bytes and rates: an estimate for comparing layouts, not a promise.

A forward takes 2 operations a token and weight and 4 for each pair of attending tokens and inner width, a backward
twice that, and once more the forward where activations are recomputed (arXiv 2001.08361, section 2.1). A decode step
reads all weights and caches from memory, which takes longer than its arithmetic.
"""

from dataclasses import dataclass

from distill.planning.setup import Setup
from distill.planning.shapes import ModelShape
from distill.planning.traffic import Flow, reads

# Launching the kernels of one layer, eagerly and one after the other: what a decode step of a small model waits for.
_LAUNCH = 0.3e-3
# AdamW reads and writes master weights, both moments and the gradient, and writes the weight.
_UPDATE_BYTES = 30
# Bytes a second between a GPU and its host, and of the host's memory for each of its ranks: an allowance.
_HOST = 25e9


@dataclass(frozen=True)
class Duration:
    """Seconds on the slowest link and device."""

    round: float
    """Sampling a round."""
    loss: float
    """Forward and backward of all micro-batches of a step."""
    update: float
    step: float
    """An optimizer step with its share of a round."""


def duration_of(setup: Setup, flows: list[Flow]) -> Duration:
    """How long it will take about."""
    sent = {
        (phase, within): sum(_seconds(setup, flow) for flow in flows if (flow.phase, flow.within) == (phase, within))
        for phase in ("rollouts", "loss", "update")
        for within in ("replica", "replicas")
    }
    sampled = (_sampling(setup) + sent["rollouts", "replica"] + sent["rollouts", "replicas"]) if setup.samples else 0.0
    # Gathering and scattering go on beside the arithmetic; a layer waits for its own all-reduces.
    loss = max(_training(setup), sent["loss", "replicas"], _from_host(setup)) + sent["loss", "replica"]
    shard = setup.student.parameters / setup.cluster.ranks
    memory = _HOST if setup.zero.offload_optimizer else setup.cluster.memory_bandwidth
    update = _UPDATE_BYTES * shard / memory + sent["update", "replicas"]
    return Duration(sampled, loss, update, sampled * setup.feed.rounds + loss + update)


def _seconds(setup: Setup, flow: Flow) -> float:
    cluster = setup.cluster
    spans_nodes = cluster.nodes > 1 and (
        flow.within == "replicas" or max(shape.tp for shape in setup.models()) > cluster.per_node
    )
    return flow.sent / (cluster.network if spans_nodes else cluster.bandwidth)


def _from_host(setup: Setup) -> float:
    """Offloaded weights go up for every forward and backward, offloaded optimizers get the gradients."""
    zero, size = setup.zero, setup.item * setup.student.parameters / setup.cluster.ranks
    return setup.micro_batches * size * (2 * zero.offload_parameters + zero.offload_optimizer) / _HOST


def _operations(shape: ModelShape, tokens: float, context: float, with_head: float) -> float:
    """Of a forward; `context` tokens are attended to on average, `with_head` tokens go through the head."""
    attention = 4 * shape.kv_width / 2 * shape.heads / shape.kv_heads * context
    return tokens * (2 * shape.matrices + attention) + 2 * with_head * shape.head_size


def _training(setup: Setup) -> float:
    count = setup.micro_batches + setup.plain_micro_batches
    rows = count * setup.config.optim.micro_batch
    tokens, answered = rows * setup.length, rows * setup.answered
    passes = 4 if setup.config.student.gradient_checkpointing else 3
    operations = passes * _operations(setup.student, tokens, setup.length / 2, answered) / setup.student.tp
    if setup.teacher:
        feed = setup.feed
        plain = setup.plain_micro_batches if feed.plain_read else 0
        read = feed.read * setup.micro_batches + plain
        operations += _reading(setup, read * setup.config.optim.micro_batch)
        # The vocabulary of its head is dealt out as the student's is.
        share = (setup.micro_batches + plain) / count / setup.student.tp
        operations += share * _operations(setup.teacher, 0, 0, answered)
    return operations / setup.cluster.flops


def _reading(setup: Setup, rows: float) -> float:
    """Operations of the teacher's forward over so many of a rank's rows, its cohort's with them."""
    assert setup.teacher
    tokens = rows * setup.cohort * setup.length
    return _operations(setup.teacher, tokens, setup.length / 2, 0) / setup.teacher.tp


def _sampling(setup: Setup) -> float:
    rollout, cluster = setup.config.rollout, setup.cluster
    rows = min(rollout.batch, setup.decoded)
    batches = -(-setup.decoded // rows)
    context = setup.prompt + rollout.max_new_tokens / 2
    # What the teacher reads behind it.
    behind = setup.feed.paired / setup.dp + (setup.rows if setup.teacher and not setup.mixes else 0)
    total = _reading(setup, behind) / cluster.flops if behind else 0.0
    for shape, forwards in zip(setup.models(), reads(setup), strict=False):
        reading = _operations(shape, rows * setup.prompt, setup.prompt / 2, 0) / shape.tp / cluster.flops
        drawing = _operations(shape, rows * rollout.max_new_tokens, context, rows * rollout.max_new_tokens)
        weights = (shape.matrices + shape.head_size) / shape.tp
        bytes_read = setup.item * (weights + rows * context * shape.kv_on_rank)
        launches = _LAUNCH * shape.layers if cluster.device == "cuda" else 0.0
        decode = max(
            forwards * max(bytes_read / cluster.memory_bandwidth, launches), drawing / shape.tp / cluster.flops
        )
        total += batches * (reading + decode)
    return total
