"""Sampling from the teacher–student mixture, against the same work written with transformers alone.

`naive`: both models at every token, then a scoring pass of the teacher. `generate`: the student's `model.generate`,
which neither mixes nor scores. All reach the last token but `short`, whose responses end after 4 to 32 of 64 tokens.
The floor under `floor_fraction` is derived in `tools/benchmarks/floor.py`.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import RolloutSettings
from distill.data.batches import Rollouts
from distill.deepspeed_settings import resolve_dtype
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology, start, stop
from tools.benchmarks import gather
from tools.benchmarks.floor import bandwidth, matrix_rate, mixed_rollout_floor
from tools.benchmarks.models import name_of, open_pair, random_prompts
from tools.benchmarks.plain import generate, mix_and_score
from tools.benchmarks.timing import interleaved, ratio, spread


class Plain:
    """A whole model as the rollout worker takes it."""

    def __init__(self, model: PreTrainedModel, vocab: int):
        self.model, self.vocab = model, vocab

    missing_bytes = 0

    def train(self, mode: bool = True) -> None:
        """Always in evaluation mode."""

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """Nothing to gather."""
        yield self.model

    by_layer = whole


class EndAt:
    """Ends row i after `lengths[i]` tokens."""

    def __init__(self, lengths: Int[Tensor, " batch"]):
        self.lengths = lengths

    def __call__(self, tokens: Int[Tensor, "batch so_far"], rows: Int[Tensor, " alive"]) -> Bool[Tensor, " alive"]:
        """Whether these rows are long enough."""
        return tokens.shape[1] >= self.lengths[rows]


class Bench:
    """One batch of random prompts, and all ways of answering it."""

    def __init__(self, args: argparse.Namespace, topology: Topology):
        self.args, self.topology, self.dtype = args, topology, resolve_dtype("auto")
        self.student, self.teacher = open_pair(args.teacher, args.student, str(topology.device), self.dtype)
        self.vocab = min(model.get_output_embeddings().weight.shape[0] for model in (self.student, self.teacher))
        self.prompts = random_prompts(args.rows, args.prompt, self.vocab)
        self.settings = RolloutSettings(max_new_tokens=args.new_tokens, alpha=args.alpha, batch=args.rows)
        self.never = torch.full((args.rows,), args.new_tokens + 1, device=topology.device)
        low, high = args.new_tokens / 16, args.new_tokens / 2
        self.early = torch.linspace(low, high, args.rows).round().long().to(topology.device)

    def collect(self, ends: Tensor, mixed: bool = True) -> Rollouts:
        """What the trainer calls, gathering and packing included."""
        settings = self.settings if mixed else self.settings.model_copy(update={"alpha": 0.0})
        teacher = Plain(self.teacher, self.vocab) if mixed else None
        student = Plain(self.student, self.vocab)
        worker = RolloutWorker(student, teacher, settings, EndAt(ends), self.args.seed, self.topology)
        return worker.collect(self.prompts, torch.arange(self.args.rows), 0)

    def variants(self) -> dict[str, Callable[[], object]]:
        """By the names that the figures carry."""
        prompts, new_tokens = self.prompts.to(self.topology.device), self.args.new_tokens
        return {
            "mixed": lambda: self.collect(self.never),
            "student": lambda: self.collect(self.never, mixed=False),
            "short": lambda: self.collect(self.early),
            "generate": lambda: generate(self.student, prompts, new_tokens),
            "naive": lambda: mix_and_score(self.student, self.teacher, prompts, new_tokens, self.args.alpha),
        }

    def passes(self) -> dict[str, float]:
        """Forwards of a token per response token, the prompt's all but the last left out; and how many calls."""
        seen = {"student": 0, "teacher": 0}
        calls = dict(seen)

        def count(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, given: object, kwargs: dict[str, Tensor]) -> None:
                seen[name] += kwargs["input_ids"].numel()
                calls[name] += 1

            return hook

        models = {"student": self.student, "teacher": self.teacher}
        hooks = [
            model.base_model.register_forward_pre_hook(count(name), with_kwargs=True) for name, model in models.items()
        ]
        rollouts = self.collect(self.never)
        for hook in hooks:
            hook.remove()
        before = self.args.rows * (self.prompts.prompt_ids.shape[1] - 1)
        tokens = int(rollouts.response_lengths.sum())
        figures = {f"{name}_passes": (count - before) / tokens for name, count in seen.items()}
        return figures | {f"{name}_calls": float(count) for name, count in calls.items()}


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, object]:
    """All figures of one process."""
    topology = start()
    bench = Bench(args, topology)
    passes = bench.passes()
    times = interleaved(bench.variants(), args.repeats)
    times["full"] = times["mixed"]
    medians = {name: statistics.median(took) for name, took in times.items() if name != "full"}
    device = str(topology.device)
    rates = matrix_rate(device, bench.dtype), bandwidth(device)
    floor = mixed_rollout_floor(
        bench.student,
        bench.teacher,
        args.rows,
        int(bench.prompts.prompt_lengths.sum()),
        args.new_tokens,
        (int(passes["student_calls"]), int(passes["teacher_calls"])),
        rates,
    )
    stop()
    ranks = {} if args.one_process else gather.figures(args.rows, args.new_tokens, max(args.repeats // 2, 1))
    pairs = (("mixed", "naive"), ("mixed", "generate"), ("student", "generate"), ("short", "full"))
    return {
        "device": device,
        "teacher": str(args.teacher or "random weights of SmolLM2-135M's shape"),
        "precision": name_of(bench.dtype),
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("rows", "prompt", "new_tokens", "alpha", "repeats")},
        **passes,
        **{name: value for pair in pairs for name, value in ratio(times, *pair).items()},
        "tokens_per_s_mixed": args.rows * args.new_tokens / medians["mixed"],
        "floor_fraction": floor / medians["mixed"],
        "floor_seconds": floor,
        f"gflops_{name_of(bench.dtype)}": rates[0] / 1e9,
        "gb_per_s": rates[1] / 1e9,
        **ranks,
        **{f"{name}_seconds": value for name, value in medians.items()},
        **{f"{name}_seconds_spread": spread(times[name]) for name in medians},
    }
