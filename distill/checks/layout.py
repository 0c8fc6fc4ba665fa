"""Whether the ranks, the batches and the machine fit together."""

import os
import shutil

import torch
from deepspeed.accelerator import get_accelerator

from distill.checks.report import Report
from distill.config import Config
from distill.deepspeed_settings import resolve_dtype
from distill.objective_settings import Distillm2Settings, DistillmSettings


def check_parallel(config: Config, world_size: int | None, report: Report) -> None:
    """The tensor-parallel degrees."""
    tp = config.parallel
    report.check(
        not config.objective.needs_teacher or tp.student_tp in (1, tp.teacher_tp),
        "parallel.teacher_tp",
        tp.teacher_tp,
        f"does not go with parallel.student_tp = {tp.student_tp}; DeepSpeed has one tensor-parallel group a process",
        f"give {tp.student_tp}, or parallel.student_tp=1",
    )
    degrees = {"parallel.student_tp": tp.student_tp}
    if config.objective.needs_teacher:
        degrees["parallel.teacher_tp"] = tp.teacher_tp
    for field, degree in degrees.items():
        report.check(
            world_size is None or world_size % degree == 0,
            field,
            degree,
            f"does not divide the {world_size} ranks",
            f"start a multiple of {degree} ranks or lower it",
        )

    if config.objective.orders_vocabulary:
        report.check(
            tp.student_tp == 1,
            "parallel.student_tp",
            tp.student_tp,
            f"deals the vocabulary out over ranks, which {config.objective.name} must put in order as a whole",
            "give 1; the teacher may stay sharded",
        )


def check_batches(config: Config, world_size: int | None, report: Report) -> None:
    """Batch sizes over replicas and micro-batches."""
    optim, rollout = config.optim, config.rollout
    replicas = 1 if world_size is None else max(world_size // config.parallel.student_tp, 1)
    # DistiLLM-2 takes two sequences a prompt, in micro-batches of their own.
    kinds = 2 if isinstance(config.objective, Distillm2Settings) else 1
    share = optim.batch_size // (replicas * kinds)
    report.check(
        optim.batch_size % (replicas * kinds) == 0,
        "optim.batch_size",
        optim.batch_size,
        f"does not divide over {replicas} data-parallel ranks" + (" and two responses a prompt" if kinds > 1 else ""),
        f"give a multiple of {replicas * kinds}",
    )
    report.check(
        share % optim.micro_batch == 0 and share > 0,
        "optim.micro_batch",
        optim.micro_batch,
        f"does not divide a rank's share of {share} sequences" + (" of either kind" if kinds > 1 else ""),
        f"give a divisor of {share}",
    )
    sampled = max(optim.batch_size // kinds, 1)
    if config.objective.samples and not isinstance(config.objective, DistillmSettings):
        report.check(
            rollout.per_round % sampled == 0,
            "rollout.per_round",
            rollout.per_round,
            f"is not a multiple of optim.batch_size = {optim.batch_size}" + (", halved" if kinds > 1 else ""),
            f"give {max(rollout.per_round // sampled, 1) * sampled}",
        )
    together = optim.batch_size if isinstance(config.objective, DistillmSettings) else rollout.per_round
    report.check(
        not config.objective.samples or together % rollout.samples_per_prompt == 0,
        "rollout.samples_per_prompt",
        rollout.samples_per_prompt,
        f"does not divide the {together} responses that are sampled together",
        f"give a divisor of {together}",
    )


def check_machine(config: Config, report: Report) -> None:
    """The accelerator, the compiler and the precision."""
    accelerator = get_accelerator()
    report.check(
        accelerator.is_available(),
        "DS_ACCELERATOR",
        accelerator.device_name(),
        "this host has no such device, or torch was not built for it",
        "give cpu, or start on a host that has one",
    )
    cpu = accelerator.device_name() == "cpu"
    compiler = os.environ.get("CXX", "g++")
    report.check(
        not cpu or shutil.which(compiler) is not None,
        "CXX",
        compiler,
        "no such compiler; DeepSpeed builds its CPU communication with it",
        "install g++ (Debian: apt-get install g++)",
    )
    report.check(
        not (cpu and config.precision == "fp16"),
        "precision",
        "fp16",
        "processors compute in bf16 or fp32",
        "give auto, bf16 or fp32",
    )
    if cpu and config.precision == "bf16" and resolve_dtype("auto") != torch.bfloat16:
        told = "this processor has no bf16 instructions, its products may take a hundred times as long as in fp32"
        report.notices.append(f"precision = bf16: {told}; auto takes fp32 here")
