"""KL(q‖p) through both lm_heads, forward and backward.

Plain: whole logits of both models and autograd. Fused: what training uses, chunk by chunk with the gradient in closed
form.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from distill.deepspeed_settings import resolve_dtype
from distill.models.heads import Finish
from distill.models.vocab_shard import VocabShard
from distill.objectives.chunked import HiddenLogits, sum_over_hidden
from distill.objectives.closed_forms import reverse_kl
from distill.objectives.divergences import exact, kl, log_probabilities
from tools.benchmarks.models import name_of
from tools.benchmarks.timing import interleaved

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Hidden states and head of the student, then of the teacher."""


def inputs(sizes: dict[str, int], dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Logits of standard deviation 2, about what trained models give; each model has its own head."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    n, h, v = sizes["tokens"], sizes["hidden"], sizes["vocab"]
    head = 2 / h**0.5
    student, teacher = (normal(n, h), normal(v, h) * head), (normal(n, h), normal(v, h) * head)
    return student[0].requires_grad_(), student[1].requires_grad_(), *teacher


def plain(h_q: Tensor, w_q: Tensor, h_p: Tensor, w_p: Tensor) -> Tensor:
    """Σ KL(q‖p) from whole logits, by autograd."""
    return kl(log_probabilities(h_q @ w_q.T), log_probabilities(h_p @ w_p.T)).sum()


def fused(h_q: Tensor, w_q: Tensor, h_p: Tensor, w_p: Tensor) -> Tensor:
    """The same through `sum_over_hidden`."""

    teacher = HiddenLogits(h_p, lambda states: states @ w_p.T)

    def evaluate(logits: Tensor, tokens: slice, shard: VocabShard) -> tuple[Tensor, Tensor]:
        log_q, log_p = shard.log_softmax(exact(logits), exact(teacher(tokens)))
        value, gradient = reverse_kl(log_q, log_p, shard)
        return value.sum(), gradient

    return sum_over_hidden(h_q, w_q, None, len(w_q), Finish(), evaluate)


def forward_and_backward(of: Callable[..., Tensor], given: Inputs) -> None:
    """One pass; gradients start from nothing."""
    for tensor in given[:2]:
        tensor.grad = None
    of(*given).backward()


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _peak(name: str, sizes: dict[str, int], device: str, queue: "multiprocessing.Queue[float]") -> None:
    given = inputs(sizes, resolve_dtype("auto"), device)
    accelerator = get_accelerator()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of making the inputs
        before = _peak_resident_bytes()
        forward_and_backward(VARIANTS[name], given)
        queue.put(_peak_resident_bytes() - before)
    else:
        accelerator.reset_peak_memory_stats()
        before = accelerator.memory_allocated()
        forward_and_backward(VARIANTS[name], given)
        accelerator.synchronize()
        queue.put(accelerator.max_memory_allocated() - before)


def extra_peak_bytes(name: str, sizes: dict[str, int], device: str) -> float:
    """Peak memory of one forward and backward beyond its inputs, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=_peak, args=(name, sizes, device, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring {name} ended with exit code {process.exitcode}; was there enough memory?")
    return queue.get()


def relative_error(dtype: torch.dtype, sizes: dict[str, int], device: str) -> float:
    """The fused path's largest relative error, of the value and of both gradients, against plain fp64."""
    given = inputs(sizes, dtype, device)
    exact = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in given)
    value, reference = fused(*given), plain(*exact)
    value.backward()
    reference.backward()
    pairs = [(value.detach(), reference.detach())]
    for ours, theirs in zip(given[:2], exact[:2], strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        pairs.append((ours.grad, theirs.grad))
    return max(float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


VARIANTS: dict[str, Callable[..., Tensor]] = {"plain": plain, "fused": fused}


def run(args: argparse.Namespace) -> dict[str, object]:
    """Memory and time of fused ÷ plain, and the fused path's error."""
    device = get_accelerator().current_device_name()
    sizes = {"tokens": args.tokens, "hidden": args.hidden, "vocab": args.vocab}
    peaks = {name: extra_peak_bytes(name, sizes, device) for name in VARIANTS}
    dtype = resolve_dtype("auto")
    given = inputs(sizes, dtype, device)
    calls = {name: partial(forward_and_backward, of, given) for name, of in VARIANTS.items()}
    medians = {name: statistics.median(took) for name, took in interleaved(calls, args.repeats).items()}
    small = sizes | {"tokens": min(args.tokens, 256)}
    return {
        "device": device,
        **sizes,
        "precision": name_of(dtype),
        "threads": torch.get_num_threads(),
        "memory_ratio": peaks["fused"] / peaks["plain"],
        "time_ratio": medians["fused"] / medians["plain"],
        **{f"rel_error_{name_of(each)}": relative_error(each, small, device) for each in {torch.float32, dtype}},
        **{f"{name}_mib": peak / 2**20 for name, peak in peaks.items()},
        **{f"{name}_seconds": value for name, value in medians.items()},
    }
