"""The last words of a run: which rank, where it was, what happened, and what goes on from the last checkpoint."""

import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from distill.lifeline import typed
from distill.vigil.board import Beat

_MEMORY = (
    "turn down optim.micro_batch or rollout.batch, or set student.gradient_checkpointing=true; "
    "`python -m distill plan` says what fits"
)
_OF_CONNECTIONS = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe")


def resume() -> str:
    """The line that says how to go on."""
    return f"to resume: {typed() or 'start the same command again'}"


def say(*lines: str) -> None:
    """Print lines in one piece, below what a progress bar has left; nothing where the disk takes no more."""
    text = "".join(f"distill: {line}\n" for line in lines if line)
    with suppress(OSError):
        print(f"\n{text}", end="", file=sys.stderr, flush=True)


def flush() -> None:
    """Let go of what was printed; a disk that takes no more is no reason to end otherwise."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def trace(error: BaseException) -> None:
    """Print where an exception came from, likewise."""
    with suppress(OSError):
        traceback.print_exception(error)


def name(rank: int, host: str | None, own: bool) -> str:
    """A rank and its host, as the launcher calls it."""
    if own and host in (None, "localhost"):
        host = socket.gethostname()
    return f"rank {rank}" if host is None else f"rank {rank} ({host})"


def failed(who: str, beat: Beat, error: BaseException) -> str:
    """Of an exception."""
    first = (str(error).strip() or "no message").splitlines()[0][:300]
    if out_of_memory(error):
        return f"{who} ran out of memory {beat.where}: {first}; {_MEMORY}"
    return f"{who} failed {beat.where}: {type(error).__name__}: {first}"


def died(who: str, beat: Beat, how: str) -> str:
    """Of a process that is gone."""
    hint = "; the kernel does that where memory runs out" if "SIGKILL" in how or "or crashed" in how else ""
    return f"{who} {how} {beat.where}{hint}"


def silent(who: list[str], beat: Beat, seconds: float) -> str:
    """Of ranks that are not heard of."""
    more = f" and {len(who) - 1} more ranks" if len(who) > 1 else ""
    return (
        f"{who[0]}{more} not heard of for {seconds:.0f} s, last {beat.where}: "
        "the process is gone or does not run, or its host or network is gone"
    )


def stalled(who: list[str], beat: Beat, seconds: float, stacks: Path | None) -> str:
    """Of a run in which nothing happens, and the ranks that the others seem to wait for."""
    found = f"{', '.join(who[:3])}{' and more' if len(who) > 3 else ''}"
    waits = "in a collective" if beat.waits else "not in a collective"
    return f"no progress for {seconds:.0f} s; look at {found}: {beat.where}, {waits}; stacks of all ranks: {stacks}"


def out_of_memory(error: BaseException) -> bool:
    """Whether device or host had no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def follows(error: BaseException) -> bool:
    """Whether an exception may only tell of another rank's end: it was raised by a collective, or by a connection."""
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return False
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "/torch/distributed/" in files[-1] or any(word in str(error) for word in _OF_CONNECTIONS)
