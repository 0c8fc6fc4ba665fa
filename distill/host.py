"""What a rank asks of the machine it runs on: its share of the cores, a calm allocator, free memory, the network."""

import ctypes
import os
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from deepspeed.accelerator import get_accelerator

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_PR_SET_THP_DISABLE = 41
# The largest threshold that glibc takes.
_KEEPING = {_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**28}
_RETURNING = {_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: 2**17, _M_TRIM_THRESHOLD: 2**17, _M_TOP_PAD: 0}


def ranks_on_host() -> int:
    """How many ranks share this host."""
    return int(os.environ.get("LOCAL_SIZE", "1"))


def prepare_cpu_rank() -> None:
    """Split the host's cores between its ranks, and keep freed memory for reuse."""
    if "OMP_NUM_THREADS" not in os.environ:
        # torch would start a thread a core in every rank.
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks_on_host(), 1))
    _keep_freed_memory()


def leave_out_cudnn_attention() -> None:
    """Keep `scaled_dot_product_attention` from taking cuDNN's kernels.

    cuDNN plans anew for every new shape, and every token of a growing cache is one: 37 ms a call on an H200, against
    0.1 ms. With a mask its gradients can be NaN there (pytorch/pytorch#196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def find_ninja() -> None:
    """Let DeepSpeed find the ninja beside this interpreter, where none is on the path, as through ssh.

    It calls it by name to build its operators.
    """
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"


def _keep_freed_memory() -> None:
    # glibc gives every large buffer back to the kernel when it is freed, and whole-vocabulary logits are large: a
    # step can then spend more time on page faults than on arithmetic. The very largest, such as a head's gradient, it
    # may have back: what is allocated meanwhile and stays would make each one's place too small for the next.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _tune(_KEEPING, huge_pages=True)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """While a model loads, give every large buffer back to the kernel when it is freed.

    Each weight is whole for a moment, between shards that stay: the holes that this leaves in a heap fit nothing that
    comes later, and a rank would end up with far more than its share of the model.
    """
    if get_accelerator().device_name() != "cpu":
        yield
        return
    _tune(_RETURNING, huge_pages=False)
    try:
        yield
    finally:
        _tune(_KEEPING, huge_pages=True)


def _tune(options: dict[int, int], huge_pages: bool) -> None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc: nothing to calm
    # A shard seldom ends where a huge page does.
    libc.prctl(_PR_SET_THP_DISABLE, int(not huge_pages), 0, 0, 0)
    for option, value in options.items():
        libc.mallopt(option, value)
    libc.malloc_trim(0)


def unlink_shared_buffer(rank: int) -> None:
    """Take the name from this rank's DeepSpeed buffer in shared memory, once all ranks of the host have mapped it.

    Nobody else does: each run would leave 66 MiB a rank in memory, until the machine has none left.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`; None if there is no way, or only one that no other host has."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            ours = str(probe.getsockname()[0])
    except OSError:
        return None
    # Where `host` is this machine, under a name of the loopback.
    return None if ours.startswith("127.") or ours == "::1" else ours


def interface_towards(host: str) -> str | None:
    """The network interface over which this machine reaches `host`; None as for the address."""
    ours = address_towards(host)
    for name, addresses in psutil.net_if_addrs().items():
        # A link-local IPv6 address carries its interface behind a %.
        if any(item.address.partition("%")[0] == ours for item in addresses):
            return name
    return None


def free_host_memory_bytes() -> float:
    """Of this host, or of the part of it that a container or a scheduler's job may use."""
    free = float(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition(":")[2]
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit, used = ((folder / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        free = min(free, float(limit) - float(used))  # without a limit it says "max"
    return max(free, 0.0)


def free_memory_bytes() -> float:
    """What this rank may still take: its share of the host's memory, or what its accelerator has left."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return free_host_memory_bytes() / ranks_on_host()
    # The allocator's own reserve can be used again.
    reserve = accelerator.memory_reserved() - accelerator.memory_allocated()
    return float(accelerator.available_memory() + reserve)


def peak_memory_gib() -> float:
    """This rank's peak: resident memory on a CPU rank, allocated accelerator memory elsewhere."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return accelerator.max_memory_allocated() / 2**30


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, pinned where that speeds the way back."""
    accelerator, tensor = get_accelerator(), tensor.cpu()
    return tensor if accelerator.is_pinned(tensor) else accelerator.pin_memory(tensor)
