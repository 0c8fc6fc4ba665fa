"""The run and the cluster as plain numbers, every default filled in."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from distill.checks.layout import check_batches, check_parallel
from distill.checks.report import Report
from distill.config import Config, ModelSettings
from distill.data.records import MANIFEST, read_manifest
from distill.deepspeed_settings import read_deepspeed_json, resolve_dtype
from distill.errors import BadInput
from distill.objective_settings import MiniLLMSettings
from distill.planning.shapes import ModelShape, read_shape

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
class Zero:
    """What counts of a DeepSpeed JSON; sizes in parameters, DeepSpeed 0.19's own defaults where it says nothing."""

    stage: int
    reduce_bucket: int
    prefetch_bucket: int
    persistence: int
    max_live: int
    max_reuse: int
    sub_group: int
    overlap: bool
    offload_optimizer: bool
    offload_parameters: bool

    @classmethod
    def of(cls, path: Path) -> "Zero":
        """The settings in `path`.

        Raises:
            BadInput: no such file, or no JSON object.
        """
        given = read_deepspeed_json(path).get("zero_optimization", {})
        zero: dict[str, Any] = {key: value for key, value in given.items() if value != "auto"}
        stage = zero.get("stage", 0)

        def number(name: str, default: float) -> int:
            return int(zero.get(f"stage3_{name}", zero.get(name, default)))

        def offloaded(name: str) -> bool:
            return zero.get(name, {}).get("device", "none") != "none"

        return cls(
            stage=stage,
            reduce_bucket=number("reduce_bucket_size", 5e8),
            prefetch_bucket=number("prefetch_bucket_size", 5e7),
            persistence=number("param_persistence_threshold", 1e5),
            max_live=number("max_live_parameters", 1e9),
            max_reuse=number("max_reuse_distance", 1e9),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            offload_optimizer=offloaded("offload_optimizer"),
            offload_parameters=stage == 3 and offloaded("offload_param"),
        )


@dataclass(frozen=True)
class Setup:
    """One run on one cluster."""

    config: Config
    cluster: Cluster
    zero: Zero
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
    def tp(self) -> int:
        """Ranks that split a layer's matrices between them."""
        return self.config.parallel.student_tp

    @property
    def dp(self) -> int:
        """Replicas."""
        return self.cluster.ranks // self.tp

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
        """Rollouts of a round on one rank."""
        return -(-self.config.rollout.per_round // self.dp) if self.samples else 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on one rank, those of plain text not counted."""
        return max(self.config.optim.batch_size // self.dp // self.config.optim.micro_batch, 1)

    @property
    def plain_micro_batches(self) -> int:
        """As many of plain text, where MiniLLM takes it."""
        objective = self.config.objective
        takes = isinstance(objective, MiniLLMSettings) and self.config.data.plain_text is not None
        return self.micro_batches if takes else 0

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps on one round of rollouts."""
        rollout = self.config.rollout
        return max(rollout.per_round // self.config.optim.batch_size, 1) * rollout.inner_epochs

    def models(self) -> list[ModelShape]:
        """The student, and the teacher if there is one."""
        return [self.student, *([self.teacher] if self.teacher else [])]

    def on_rank(self, shape: ModelShape) -> float:
        """Parameters of a model that one tensor-parallel rank needs, ZeRO apart."""
        return shape.split / self.tp + shape.replicated


def prepare(config: Config, cluster: Cluster) -> Setup:
    """Read models and records, as far as a plan needs them.

    Raises:
        BadInput: a run that cannot be laid out on the cluster, or models that cannot be read; all at once.
    """
    report = Report()
    _check_cluster(cluster, report)
    if report.problems:
        raise BadInput(report.problems)
    check_parallel(config, cluster.ranks, report)
    if not report.problems:
        check_batches(config, cluster.ranks, report)
    student = _shape(config.student, "student", config, report)
    given = config.teacher if config.objective.needs_teacher else None
    teacher = _shape(given, "teacher", config, report) if given else None
    if report.problems or student is None:
        raise BadInput(report.problems)
    prompt, length, assumed = _lengths(config)
    dtype = torch.bfloat16 if cluster.device == "cuda" and config.precision == "auto" else None
    return Setup(
        config=config,
        cluster=cluster,
        zero=Zero.of(config.parallel.deepspeed),
        dtype=dtype or resolve_dtype(config.precision),
        student=student,
        teacher=teacher,
        prompt=prompt,
        length=length,
        assumed_lengths=assumed,
    )


def with_config(setup: Setup, config: Config) -> Setup:
    """The same models on the same cluster under other settings."""
    return replace(setup, config=config, zero=Zero.of(config.parallel.deepspeed))


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
        report.check(rate > 0, field, rate, "is not above 0", "give what the device has")


def _shape(settings: ModelSettings, name: str, config: Config, report: Report) -> ModelShape | None:
    try:
        shape = read_shape(settings, f"{name}.path")
    except BadInput as error:
        report.problems += error.problems
        return None
    tp = getattr(config.parallel, f"{name}_tp")
    for what, count in (("attention heads", shape.heads), ("key and value heads", shape.kv_heads)):
        wrong = f"does not divide the {name}'s {count} {what}"
        fitting = [degree for degree in range(1, count + 1) if count % degree == 0 and shape.heads % degree == 0]
        report.check(count % tp == 0, f"parallel.{name}_tp", tp, wrong, f"give one of {fitting}")
    return shape


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
