"""The rank grid: data-parallel replicas × tensor-parallel shards. The only file that makes process groups.

Ranks are `arange(world).view(dp, tp)`, as DeepSpeed lays them out: neighbours share a replica.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from distill.build_locks import remove_stale_locks
from distill.errors import BadInput, Problem
from distill.host import (
    find_ninja,
    interface_towards,
    leave_out_cudnn_attention,
    prepare_cpu_rank,
    unlink_shared_buffer,
)

T = TypeVar("T")

# A rollout or an evaluation may keep one rank busy for long while the others wait in a collective.
_TIMEOUT_MINUTES = 120.0


@dataclass(frozen=True)
class Topology:
    """This process's place in the grid."""

    rank: int
    world_size: int
    tp_size: int
    device: torch.device
    dp_group: dist.ProcessGroup | None
    tp_group: dist.ProcessGroup | None

    @property
    def dp_size(self) -> int:
        """Number of model replicas."""
        return self.world_size // self.tp_size

    @property
    def dp_rank(self) -> int:
        """Which replica this rank belongs to; ranks of one replica take the same rows."""
        return self.rank // self.tp_size

    @property
    def rank_in_replica(self) -> int:
        """This rank's number among those of its replica."""
        return self.rank % self.tp_size

    @property
    def each_alone(self) -> "Topology":
        """The same ranks, each a replica of its own: of a student that is whole beside a teacher that is sharded."""
        return replace(self, tp_size=1, dp_group=dist.group.WORLD, tp_group=None)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def sum_over_replicas(self, value: Tensor) -> Tensor:
        """Sum over the data-parallel group, on every rank (one all-reduce)."""
        value = value.clone()
        if self.dp_size > 1:
            dist.all_reduce(value, group=self.dp_group)
        return value

    def agree_in_replica(self, value: Tensor) -> Tensor:
        """The value of the replica's first rank, on all its tensor-parallel ranks; rounding may have parted them."""
        if self.tp_size > 1:
            value = value.contiguous()
            dist.broadcast(value, src=self.dp_rank * self.tp_size, group=self.tp_group)
        return value

    def max_over_ranks(self, value: float) -> float:
        """The largest of all ranks' values (one all-reduce)."""
        return self.max_of_each([value])[0]

    def max_of_each(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' values, one by one (one all-reduce)."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def gather_in_replica(self, value: T) -> list[T]:
        """The picklable values of this replica's ranks, in rank order, on each of them."""
        values = [value] * self.tp_size
        if self.tp_size > 1:
            dist.all_gather_object(values, value, group=self.tp_group)
        return values

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's picklable value, in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def start(tp_size: int = 1, timeout_minutes: float = _TIMEOUT_MINUTES) -> Topology:
    """Join the process group that the launcher describes, or make a group of one without a launcher.

    A collective that lasts longer than `timeout_minutes` ends the run: a rank or its host is gone.
    """
    find_ranks()
    choose_interface(os.environ["MASTER_ADDR"])
    find_ninja()
    leave_out_cudnn_attention()
    accelerator, timeout = get_accelerator(), timedelta(minutes=timeout_minutes)
    if accelerator.device_name() == "cpu":
        prepare_cpu_rank()
        # On every rank, before it may wait for a lock itself: whoever has waited takes the operator for built.
        remove_stale_locks()
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), timeout=timeout, verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    if accelerator.device_name() == "cpu":
        dist.barrier()
        unlink_shared_buffer(rank)
    device = torch.device(accelerator.current_device_name())
    if tp_size == 1:
        return Topology(rank, world, 1, device, dist.group.WORLD, None)
    grid = torch.arange(world).view(-1, tp_size)
    # Every rank must create every group, in the same order.
    dp_groups = [dist.new_group(column, timeout=timeout) for column in grid.T.tolist()]
    tp_groups = [dist.new_group(row, timeout=timeout) for row in grid.tolist()]
    return Topology(rank, world, tp_size, device, dp_groups[rank % tp_size], tp_groups[rank // tp_size])


def find_ranks() -> None:
    """Put RANK, WORLD_SIZE, LOCAL_RANK and the meeting point into the environment if the launcher did not.

    Under `mpirun` DeepSpeed asks MPI for them; without any launcher this process is alone.

    Raises:
        BadInput: RANK is there, as it may be left in a shell, and what every launcher sets beside it is not.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])  # torchrun's word for it
    if "RANK" in os.environ:
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            wrong = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
            raise BadInput(Problem("RANK", os.environ["RANK"], wrong, "unset RANK, or start through a launcher"))
        return
    if any(int(os.environ.get(name, "1")) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        _ask_mpi()
        return
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def _ask_mpi() -> None:
    # DeepSpeed takes the first address of rank 0's host, which need not be one that the other hosts reach.
    given = {name: os.environ[name] for name in ("MASTER_ADDR",) if name in os.environ}
    port = int(os.environ.get("MASTER_PORT", deepspeed.constants.TORCH_DISTRIBUTED_DEFAULT_PORT))
    deepspeed.comm.mpi_discovery(distributed_port=port, verbose=False)
    os.environ |= given
    # It has served. Ranks end without taking the interpreter down, in which mpi4py would do this; and they may end at
    # different times, for which MPI would make them wait.
    from mpi4py import MPI

    MPI.Finalize()
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        os.environ["LOCAL_SIZE"] = os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"]


def choose_interface(towards: str) -> None:
    """Where ranks of several hosts meet over gloo, take the interface that leads to `towards`, unless one is chosen.

    gloo would take the one that the host's own name resolves to: on many machines the loopback.
    """
    several = int(os.environ["WORLD_SIZE"]) > int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
    name = interface_towards(towards) if several else None
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def stop() -> None:
    """Leave the process group; without this the last rank to exit complains."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
