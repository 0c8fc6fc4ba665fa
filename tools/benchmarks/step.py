"""One training step of on-policy reverse KL: sample, score, forward, backward, update.

`step`: what the trainer does, on one rank under ZeRO-1, with fp32 master weights. `plain`: `model.generate`, then a
forward of each model with the logits of the whole vocabulary at every response token, autograd, and torch's AdamW on
the weights as they are, which is the least one could write.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill import objectives
from distill.config import ModelSettings, OptimSettings, RolloutSettings
from distill.data.batches import TokenBatch
from distill.deepspeed_settings import resolve_dtype
from distill.engine import Engine
from distill.objective_settings import KdSettings
from distill.objectives.divergences import kl, log_probabilities
from distill.rollout.ends import EndIds
from distill.rollout.worker import RolloutWorker
from distill.teacher import Teacher
from distill.telemetry import Stopwatch
from distill.topology import Topology, start, stop
from distill.update import Updater
from tools.benchmarks.models import name_of, open_pair, random_prompts
from tools.benchmarks.plain import generate, prompt_inputs
from tools.benchmarks.timing import interleaved, ratio, spread

_ZERO1: dict[str, Any] = {"zero_optimization": {"stage": 1, "overlap_comm": False}}
_LR = 1e-6  # small, so that the last step does the same work as the first


class Ours:
    """A student and teacher under DeepSpeed, taking steps."""

    def __init__(self, args: argparse.Namespace, folder: Path, topology: Topology, vocab: int, dtype: torch.dtype):
        self.rows = torch.arange(args.rows)
        optim = OptimSettings(lr=_LR, steps=10**6, micro_batch=args.micro_batch)
        student, teacher = (
            Engine(ModelSettings(path=str(folder / name)), _ZERO1, dtype, topology, vocab, optim=given)
            for name, given in (("student", optim), ("teacher", None))
        )
        rollout = RolloutSettings(alpha=0.0, max_new_tokens=args.new_tokens, batch=args.rows)
        # No id ends a response: every step has as many tokens.
        never = EndIds([], topology.device)
        self.worker = RolloutWorker(student, teacher, rollout, never, args.seed, topology)
        self.watch, self.micro_batch = Stopwatch(), args.micro_batch
        objective = objectives.build(KdSettings(name="kd", divergence="reverse_kl", on_policy=1.0))
        self.updater = Updater(objective, student, Teacher(teacher, topology, topology), topology, self.watch)

    def step(self, prompts: TokenBatch) -> None:
        """As the trainer's."""
        with self.watch.phase("rollout"):
            rollouts = self.worker.collect(prompts, self.rows, 0)
        self.updater.step(rollouts.split(self.micro_batch), [])


def plain_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    prompts: TokenBatch,
    new_tokens: int,
    micro_batch: int,
) -> None:
    """The same work by transformers and autograd."""
    with torch.no_grad():
        responses = generate(student, prompts, new_tokens)
    for index in torch.arange(len(prompts)).split(micro_batch):
        given = prompt_inputs(prompts)
        ids = torch.cat([given["input_ids"], responses], 1)[index]
        mask = torch.cat([given["attention_mask"], torch.ones_like(responses)], 1)[index]
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
            "logits_to_keep": new_tokens + 1,
        }
        with torch.no_grad():
            log_p = log_probabilities(teacher(**inputs).logits[:, :-1].flatten(0, 1))
        log_q = log_probabilities(student(**inputs).logits[:, :-1].flatten(0, 1))
        (kl(log_q, log_p).sum() / responses.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


def run(args: argparse.Namespace) -> dict[str, object]:
    """`step_over_plain`, and where the time of a step goes."""
    topology = start()
    device, dtype = str(topology.device), resolve_dtype("auto")
    student, teacher = open_pair(args.teacher, args.student, device, dtype)
    vocab = min(model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("student", student), ("teacher", teacher)):
            model.save_pretrained(Path(folder) / name)
        ours = Ours(args, Path(folder), topology, vocab, dtype)
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=_LR)
    prompts = random_prompts(args.rows, args.prompt, vocab).to(topology.device)
    variants: dict[str, Callable[[], object]] = {
        "step": lambda: ours.step(prompts),
        "plain": lambda: plain_step(student, teacher, optimizer, prompts, args.new_tokens, args.micro_batch),
    }
    ours.step(prompts)
    ours.watch.lap()
    times = interleaved(variants, args.repeats)
    phases = ours.watch.lap()
    stop()
    total = sum(phases.values())
    medians = {name: statistics.median(took) for name, took in times.items()}
    return {
        "device": device,
        "teacher": str(args.teacher or "random weights of SmolLM2-135M's shape"),
        "precision": name_of(dtype),
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("rows", "prompt", "new_tokens", "micro_batch", "repeats")},
        **ratio(times, "step", "plain"),
        **{f"share_{name.removeprefix('time/')}": value / total for name, value in phases.items()},
        "tokens_per_s_step": args.rows * args.new_tokens / medians["step"],
        **{f"{name}_seconds": value for name, value in medians.items()},
        **{f"{name}_seconds_spread": spread(times[name]) for name in medians},
    }
