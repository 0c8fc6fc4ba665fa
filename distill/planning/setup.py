"""The run and the cluster as plain numbers, every default filled in."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from distill.checks.deepspeed import check_deepspeed
from distill.checks.layout import check_batches, check_parallel
from distill.checks.report import Report
from distill.checks.sharding import check_sharding
from distill.config import Config, ModelSettings
from distill.data.records import MANIFEST, read_manifest
from distill.deepspeed_settings import resolve_dtype
from distill.errors import BadInput, Problem
from distill.models.loading import load_config
from distill.planning.feed import Feed
from distill.planning.shapes import ModelShape, read_shape
from distill.planning.zero import Zero

GIB = 2**30

# What `make preprocess` cuts prompts and sequences to, unless told otherwise.
_MAX_PROMPT, _MAX_LENGTH = 256, 512


@dataclass(frozen=True)
class Cluster:
    """Machines to plan for. Rates are those that a training step reaches, not those of a data sheet."""

    nodes: int
    per_node: int
    memory: float
    """Bytes of each device."""
    flops: float
    """Operations a second and device, in the run's precision."""
    bandwidth: float
    """Bytes a second that a rank sends to others of its node."""
    network: float
    """Bytes a second that a rank sends to other nodes."""
    memory_bandwidth: float
    """Bytes a second that a device reads from its memory."""
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def ranks(self) -> int:
        """One a device."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Setup:
    """One run on one cluster."""

    config: Config
    cluster: Cluster
    zero: Zero
    feed: Feed
    dtype: torch.dtype
    student: ModelShape
    teacher: ModelShape | None
    prompt: int
    """Tokens of the longest prompt."""
    length: int
    """Tokens of the longest sequence that is trained on."""
    assumed_lengths: bool
    """Whether there are no records yet to tell the two."""

    @property
    def item(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def dp(self) -> int:
        """Replicas of the student."""
        return self.replicas_of(self.student)

    @property
    def cohort(self) -> int:
        """Replicas of the student that share one of the teacher, and read and sample together."""
        return max(self.teacher.tp // self.student.tp, 1) if self.teacher else 1

    @property
    def samples(self) -> bool:
        """Whether there are rollouts."""
        return self.config.objective.samples

    @property
    def mixes(self) -> bool:
        """Whether the teacher reads along while the student samples."""
        return self.samples and self.teacher is not None and not self.config.objective.own_tokenizer

    @property
    def rows(self) -> int:
        """Rollouts of a round that one rank keeps."""
        return -(-self.feed.round // self.dp)

    @property
    def decoded(self) -> int:
        """Rollouts of a round that one rank decodes: those of its whole cohort."""
        return self.rows * self.cohort

    @property
    def answered(self) -> int:
        """Tokens of a row that the loss is of."""
        return max(self.length - self.prompt, 1)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on one rank, those of plain text not counted."""
        return max(self.config.optim.batch_size // self.dp // self.config.optim.micro_batch, 1)

    @property
    def plain_micro_batches(self) -> int:
        """As many of plain text, where MiniLLM takes it."""
        return self.micro_batches if self.feed.plain else 0

    def models(self) -> list[ModelShape]:
        """The student, and the teacher if there is one."""
        return [self.student, *([self.teacher] if self.teacher else [])]

    def replicas_of(self, shape: ModelShape) -> int:
        """How often a model is there."""
        return self.cluster.ranks // shape.tp


def prepare(config: Config, cluster: Cluster) -> Setup:
    """Read models and records, as far as a plan needs them.

    Raises:
        BadInput: a run that cannot be laid out on the cluster, or models that cannot be read; all at once.
    """
    report = Report()
    _check_cluster(cluster, report)
    if report.problems:
        raise BadInput(report.problems)
    zero = _zero(config, report)
    check_parallel(config, cluster.ranks, report)
    if not report.problems:
        check_batches(config, cluster.ranks, report)
    student = _shape(config.student, "student", config, report)
    given = config.teacher if config.objective.needs_teacher else None
    teacher = _shape(given, "teacher", config, report) if given else None
    check_models(config, report)
    if report.problems or student is None or zero is None:
        raise BadInput(report.problems)
    prompt, length, assumed = _lengths(config)
    dtype = torch.bfloat16 if cluster.device == "cuda" and config.precision == "auto" else None
    return Setup(
        config=config,
        cluster=cluster,
        zero=zero,
        feed=Feed.of(config),
        dtype=dtype or resolve_dtype(config.precision),
        student=student,
        teacher=teacher,
        prompt=prompt,
        length=length,
        assumed_lengths=assumed,
    )


def with_config(setup: Setup, config: Config) -> Setup:
    """The same models on the same cluster under other settings."""
    parallel = config.parallel
    return replace(
        setup,
        config=config,
        zero=Zero.of(parallel.deepspeed),
        feed=Feed.of(config),
        student=replace(setup.student, tp=parallel.student_tp),
        teacher=replace(setup.teacher, tp=parallel.teacher_tp) if setup.teacher else None,
    )


# What AutoTP says of a model takes a model without weights; by settings, which of the two, and degree.
_SHARDING: dict[tuple[ModelSettings, str, int], list[Problem]] = {}


def check_models(config: Config, report: Report) -> None:
    """Whether AutoTP shards the models, which must be readable, as asked."""
    for name in ("student", "teacher") if config.objective.needs_teacher else ("student",):
        settings = getattr(config, name)
        key = settings, name, getattr(config.parallel, f"{name}_tp")
        if key not in _SHARDING:
            found = Report()
            try:
                check_sharding(config, name, load_config(settings, f"{name}.path"), found)
            except BadInput:
                continue  # said already
            _SHARDING[key] = found.problems
        report.problems += _SHARDING[key]


def _zero(config: Config, report: Report) -> Zero | None:
    try:
        zero = Zero.of(config.parallel.deepspeed)
    except BadInput as error:
        report.problems += error.problems
        return None
    check_deepspeed(config, report)
    return zero


def _check_cluster(cluster: Cluster, report: Report) -> None:
    for field, value in (("--nodes", cluster.nodes), ("--gpus-per-node", cluster.per_node)):
        report.check(value > 0, field, value, "is not 1 or more", "give the number there will be")
    rates = {
        "--gpu-memory": cluster.memory / GIB,
        "--flops": cluster.flops / 1e12,
        "--bandwidth": cluster.bandwidth / 1e9,
        "--network": cluster.network / 1e9,
        "--memory-bandwidth": cluster.memory_bandwidth / 1e9,
    }
    for field, rate in rates.items():
        report.check(0 < rate < math.inf, field, rate, "is no rate or size above 0", "give what the device has")


def _shape(settings: ModelSettings, name: str, config: Config, report: Report) -> ModelShape | None:
    try:
        shape = read_shape(settings, f"{name}.path")
    except BadInput as error:
        report.problems += error.problems
        return None
    return replace(shape, tp=getattr(config.parallel, f"{name}_tp"))


def _lengths(config: Config) -> tuple[int, int, bool]:
    """Longest prompt, longest trained sequence, and whether they are assumed for want of records."""
    found = (config.data.train / MANIFEST).is_file()
    prompt, recorded = _MAX_PROMPT, _MAX_LENGTH
    if found:
        settings = read_manifest(config.data.train, "data.train").settings
        prompt, recorded = settings.max_prompt, settings.max_length
    lengths = [prompt + config.rollout.max_new_tokens] if config.objective.samples else []
    if config.objective.reads_responses:
        lengths.append(recorded)
    return prompt, max(lengths), not found
