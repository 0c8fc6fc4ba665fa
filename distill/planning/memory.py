"""Bytes of one rank, item by item, while a round is sampled, a micro-batch is trained on, and the weights are updated.

Notation: Ψ parameters that a tensor-parallel rank needs, W ranks, D replicas, b bytes of a weight. Under ZeRO
(arXiv 1910.02054) AdamW in mixed precision holds b·Ψ weights, b·Ψ gradients and 12·Ψ master weights and moments;
stage 1 divides the last by D, stage 2 the gradients too, stage 3 everything. Buffers are as DeepSpeed 0.19 makes them,
which `python -m tools.benchmark scale` measures.
"""

from dataclasses import dataclass, field

import torch

from distill.planning.setup import Setup
from distill.planning.shapes import ModelShape, Saved, read_saved

PHASES = ("rollouts", "loss", "update")

# fp32 numbers of the vocabulary's size that the loss of one token makes, both models' together; see the unit test.
LOSS_NUMBERS = 8
_MASTER_AND_MOMENTS, _FP32 = 12, 4
# Tokens that go through a head together: to be scored in `rollout.follower`, in the loss of `objectives.chunked`, and
# there those whose temporaries live together.
SCORE_ROWS = 128
HEAD_ROWS, CHUNK_ROWS = {"cpu": 128, "cuda": 1024}, {"cpu": 16, "cuda": 1024}
# torch's AdamW on a processor makes the update's denominator out of place; fused kernels have no such temporaries.
_ADAM_TEMPORARIES = 2
# The CUDA context, cuBLAS's and NCCL's buffers, and what an allocator of blocks leaves unused: an allowance.
_CUDA_ALLOWANCE = 2 * 2**30


@dataclass
class Memory:
    """Items of each phase in bytes; those of `state` live in all of them, those of `host` in the host's memory."""

    state: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)

    def of(self, phase: str) -> float:
        """Bytes of the device while `phase` lasts."""
        return sum(self.state.values()) + sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        """Bytes of the device in its fullest phase."""
        return max(self.of(phase) for phase in self.phases)

    @property
    def fullest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.of)


def memory_of(setup: Setup) -> Memory:
    """What one rank will hold."""
    memory = Memory()
    _add_state(setup, memory)
    if setup.samples:
        memory.phases["rollouts"] = _rollouts(setup)
    memory.phases["loss"] = _loss(setup)
    memory.phases["update"] = _update(setup)
    for items in (memory.state, *memory.phases.values(), memory.host):
        for name in [name for name, size in items.items() if not size]:
            del items[name]
    return memory


def weight_bytes(setup: Setup, shape: ModelShape) -> float:
    """Of a model's weights that a rank keeps between steps: its shard, and the small tensors that stay whole."""
    if setup.zero.stage < 3:
        return setup.item * shape.on_rank
    whole = sum(shape.whole_below(setup.zero.persistence))
    return setup.item * (shape.parameters / setup.cluster.ranks + whole)


def missing_bytes(setup: Setup, shape: ModelShape) -> float:
    """Of the weights that a rank must gather before it can use a model; DeepSpeed shards what tensor parallelism does
    not split over all ranks."""
    if setup.zero.stage < 3:
        return 0.0
    whole_parts, whole = shape.whole_below(setup.zero.persistence)
    split = shape.split / shape.tp - whole_parts if setup.replicas_of(shape) > 1 else 0.0
    replicated = shape.replicated - whole if setup.cluster.ranks > 1 else 0.0
    return setup.item * (split + replicated)


def gathers_once(setup: Setup) -> bool:
    """Whether a round's weights are gathered whole; `auto` lets a copy take a third of the free memory."""
    wanted = setup.config.rollout.gather
    missing = sum(missing_bytes(setup, shape) for shape in setup.models())
    if wanted != "auto" or not missing:
        return wanted != "layer" or not missing
    memory = Memory()
    _add_state(setup, memory)
    return missing <= (setup.cluster.memory - sum(memory.state.values())) / 3


def activation_bytes(setup: Setup, checkpointing: bool) -> float:
    """What the student keeps of a micro-batch between forward and backward.

    Each layer also keeps an additive mask [B, T, T] where rows are padded. Recomputed in backward, only the layers'
    inputs are kept, and one layer is whole at a time.
    """
    saved: Saved = read_saved(setup.config.student, "student.path", setup.dtype, setup.student.tp)
    rows, tokens, layers = setup.config.optim.micro_batch, setup.length, setup.student.layers
    mask = tokens * setup.item
    if checkpointing:
        return rows * tokens * ((layers + 1) * saved.checkpointed_layer + saved.rest + saved.layer + mask)
    return rows * tokens * (layers * (saved.layer + mask) + saved.rest)


def _shard(setup: Setup) -> float:
    """Parameters of the student that a rank optimises."""
    if setup.zero.stage == 0:
        return setup.student.on_rank
    if setup.zero.stage < 3:
        return setup.student.on_rank / setup.dp
    return setup.student.parameters / setup.cluster.ranks


def _add_state(setup: Setup, memory: Memory) -> None:
    zero, shard, item = setup.zero, _shard(setup), setup.item
    optimizer = memory.host if zero.offload_optimizer else memory.state
    weights = memory.host if zero.offload_parameters else memory.state
    weights["student weights"] = weight_bytes(setup, setup.student)
    if setup.teacher:
        weights["teacher weights"] = weight_bytes(setup, setup.teacher)
    # Below stage 3 gradients come and go with a step.
    kept = item if zero.stage == 3 else 0
    optimizer["student gradients"] = shard * (kept + (_FP32 if zero.offload_optimizer else 0))
    optimizer["optimizer"] = shard * _MASTER_AND_MOMENTS
    if zero.stage == 3:
        memory.state["gradient buckets"] = item * zero.reduce_bucket
    if setup.cluster.device == "cuda":
        memory.state["CUDA, NCCL (allowance)"] = _CUDA_ALLOWANCE


def _rollouts(setup: Setup) -> dict[str, float]:
    """The builtin decoder's: copies of the weights, both caches at full length, one block of logits, hidden states."""
    rollout, item = setup.config.rollout, setup.item
    rows = min(rollout.batch, setup.decoded)
    readers = setup.models() if setup.mixes else [setup.student]
    once = gathers_once(setup)
    scored = max(min(SCORE_ROWS, rows * rollout.max_new_tokens), rows)
    vocab = max(shape.vocab for shape in readers)
    items = {
        "gathered weights": sum(missing_bytes(setup, s) for s in readers) if once else _fetched(setup, readers),
        "packed weights": sum(_packed(setup, shape) for shape in readers) if once else 0.0,
        "KV caches": rows * (setup.prompt + rollout.max_new_tokens) * item * sum(s.kv_on_rank for s in readers),
        # Logits, the same in fp32, and their log-softmax or exponentials.
        "logits": scored * vocab * (item + 2 * _FP32),
        "teacher's hidden states": _hidden_cache(setup) + _on_arrival(setup),
    }
    if rollout.engine == "vllm":
        items["vLLM"] = rollout.vllm_memory * setup.cluster.memory
    return items


def _fetched(setup: Setup, readers: list[ModelShape]) -> float:
    """Layer by layer both heads stay, and the largest tensor comes and goes."""
    heads = sum(shape.head_size / shape.tp for shape in readers)
    return setup.item * (heads + max(max(shape.sizes)[0] for shape in readers)) if setup.cluster.ranks > 1 else 0.0


def _packed(setup: Setup, shape: ModelShape) -> float:
    """A processor's bf16 kernels get a copy of every plain linear layer in their own order."""
    packs = setup.cluster.device == "cpu" and setup.dtype == torch.bfloat16 and shape.tp == 1
    return setup.item * (shape.matrices + shape.head_size) if packs else 0.0


def _hidden_cache(setup: Setup) -> float:
    """The teacher's final hidden states of all responses that are kept, where they wait on the device."""
    if not setup.teacher or setup.config.rollout.teacher_cache == "host":
        return 0.0
    feed, limit = setup.feed, setup.config.rollout.max_new_tokens
    tokens = (feed.kept * limit + feed.paired * setup.length) / setup.dp
    return tokens * setup.teacher.hidden * setup.item


def _on_arrival(setup: Setup) -> float:
    """Those of rows that are decoded and go elsewhere: to the host, or as other ranks' that share the teacher."""
    if not setup.teacher:
        return 0.0
    rollout = setup.config.rollout
    on_host = rollout.teacher_cache == "host"
    rows = min(rollout.batch, setup.decoded) if on_host else setup.decoded - setup.rows
    return rows * rollout.max_new_tokens * setup.teacher.hidden * setup.item


def _teacher_head(setup: Setup) -> float:
    """Beside what the rank keeps of it: what ZeRO-3 gathers, and all of it for a student that is whole."""
    if not setup.teacher:
        return 0.0
    head = setup.teacher.head_size
    own = head / setup.teacher.tp if setup.zero.stage == 3 and setup.replicas_of(setup.teacher) > 1 else 0.0
    return setup.item * (own + (head if setup.cohort > 1 else 0.0))


def _loss(setup: Setup) -> dict[str, float]:
    """The fullest moment of a forward and backward: as they start, at the head, behind it, or while gradients leave."""
    item, zero = setup.item, setup.zero
    local = setup.student.on_rank
    missing = missing_bytes(setup, setup.student)
    # Only from the second micro-batch after a round on does DeepSpeed know what to fetch ahead and what to keep.
    repeats = setup.micro_batches > 1 or setup.feed.rounds < 1 or not setup.samples
    gathered = min(missing, item * (zero.max_live if repeats else setup.student.head_size / setup.student.tp))
    prefetched = min(missing, item * zero.prefetch_bucket) if repeats else 0.0
    teacher_head = _teacher_head(setup)
    slope = setup.student.head_size / setup.student.tp
    activations = activation_bytes(setup, setup.config.student.gradient_checkpointing)
    bucket = min(zero.reduce_bucket, local)
    leaving = _leaving(setup, bucket)
    # What of a backward is still to come when the first bucket is full.
    rest = max(1 - zero.reduce_bucket / local, 0.0)
    moments = [
        {"gathered weights": gathered + prefetched + teacher_head, "activations": activations},
        {
            "gathered weights": gathered + teacher_head,
            "activations": activations,
            "head's gradient": _FP32 * slope,
            "loss chunk": _chunk(setup),
        },
        {"gathered weights": gathered, "activations": activations, "head's gradient": (_FP32 + item) * slope},
        {"gathered weights": rest * gathered, "activations": rest * activations, "leaving gradients": leaving},
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    return fullest | {"teacher's hidden states": _hidden_cache(setup)} | _gradients_between_micro_batches(setup)


def _chunk(setup: Setup) -> float:
    """A block of tokens through both heads, and the fp32 temporaries of a chunk of it, both in `objectives.chunked`."""
    tokens = setup.config.optim.micro_batch * setup.length
    head_rows, rows = (min(kind[setup.cluster.device], tokens) for kind in (HEAD_ROWS, CHUNK_ROWS))
    models = 2 if setup.teacher else 1
    numbers = LOSS_NUMBERS if setup.teacher else LOSS_NUMBERS / 2
    return setup.student.vocab / setup.student.tp * (models * head_rows * setup.item + numbers * rows * _FP32)


def _leaving(setup: Setup, bucket: float) -> float:
    """A full bucket on its way: its copies, and a gradient that has not gone into it yet."""
    if setup.zero.stage == 3:
        return 2 * setup.item * bucket
    largest = max(setup.student.embedding, setup.student.head) / setup.student.tp
    buffers = (2 if setup.zero.overlap else 1) * setup.zero.reduce_bucket if setup.zero.stage else 0
    return setup.item * (buffers + (bucket if setup.zero.stage == 2 else 0) + largest)


def _gradients_between_micro_batches(setup: Setup) -> dict[str, float]:
    """Below stage 3: of all micro-batches so far, whole or a replica's part."""
    stage, local = setup.zero.stage, setup.student.on_rank
    if stage == 3:
        return {}
    share = 1 / setup.dp if stage == 2 else 1
    several = setup.micro_batches > 1
    buffers = setup.zero.reduce_bucket if stage == 1 and several else 0
    return {"student gradients": setup.item * (local * share * several + buffers)}


def _update(setup: Setup) -> dict[str, float]:
    """fp32 gradients of the shard beside what AdamW makes."""
    shard, stage, cpu = _shard(setup), setup.zero.stage, setup.cluster.device == "cpu"
    if setup.zero.offload_optimizer:
        return {"update": 0.0}
    gradients = setup.item * shard if stage < 3 else 0.0
    # Group after group: what tensor parallelism splits and what not are two, and ZeRO-3 cuts large ones.
    student = setup.student
    group = shard if setup.student.tp == 1 else shard * max(student.split, student.replicated) / student.parameters
    if stage == 3:
        group = min(group, setup.zero.sub_group)
    temporaries = (1 + (_ADAM_TEMPORARIES if cpu else 0)) * _FP32 * group
    return {"student gradients": gradients, "fp32 gradients and AdamW": temporaries}
