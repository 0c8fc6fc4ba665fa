"""Who works on the shards: this process, processes on this machine's cores, or the ranks of an MPI launch."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from distill.errors import BadInput, Problem

Task = TypeVar("Task")
Result = TypeVar("Result")

_RANKS_STARTED = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
"""How many ranks Open MPI, MPICH's relatives and srun say they have started, and which of them a process is."""


@dataclass
class _Crew:
    """Workers behind one executor, and how many tasks to keep there."""

    executor: Executor
    most: int
    running: int = 0


class Pool:
    """Workers that take one task after the other."""

    def __init__(self, crews: list[_Crew], size: int):
        self._crews = crews
        self.size = size
        """Number of workers."""

    def results(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results as they come; tasks are taken in order, and only as fast as there are workers for them.

        Raises:
            BadInput: a worker process was killed.
        """
        ahead = iter(tasks)
        running: dict[Future[Result], _Crew] = {}
        while True:
            for crew in self._crews:
                while crew.running < crew.most:
                    for task in ahead:
                        running[crew.executor.submit(work, task)] = crew
                        crew.running += 1
                        break
                    else:
                        break
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.pop(future).running -= 1
                try:
                    yield future.result()
                except BrokenProcessPool:
                    wrong = "one of them was killed, as a rule because memory was short"
                    mend = "run the same command again, which continues, with fewer --workers"
                    raise BadInput(Problem("--workers", self.size, wrong, mend)) from None


@contextmanager
def processes(count: int) -> Iterator[Pool]:
    """A pool of so many processes; for one, this process itself."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    try:
        if count == 1:
            yield Pool([_Crew(_Here(), 1)], 1)
            return
        # A fork of this process would copy its threads' locks; those of a server share its imports, which take seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_prep.tokenize"])
        with ProcessPoolExecutor(count, context, _start_process) as executor:
            yield Pool([_Crew(executor, 2 * count)], count)
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process; one traceback is enough
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Here(Executor):
    """Does the work when it is submitted."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


def under_mpi() -> bool:
    """This process is one of several that an MPI launcher started."""
    return _claimed() > 1


def is_first_rank() -> bool:
    """This process is the one to speak for all, by what the launcher says, before MPI is asked."""
    rank = next((rank for size, rank in _RANKS_STARTED.items() if int(os.environ.get(size, "1")) > 1), "")
    return os.environ.get(rank, "0") == "0"


def _claimed() -> int:
    return max(int(os.environ.get(name, "1")) for name in _RANKS_STARTED)


@contextmanager
def ranks() -> Iterator[Pool | None]:
    """On rank 0 a pool of all ranks, itself among them; on the others None, when there is no more to do.

    Raises:
        BadInput: MPI does not know of the other ranks.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    mpi, executor_of = _import_mpi()
    size = mpi.COMM_WORLD.Get_size()
    if size == 1:  # each would take the whole work for its own
        wrong = f"{_claimed()} processes were started, but MPI joins this one with no other"
        mend = "under Slurm use srun --kill-on-bad-exit=1 --mpi=pmix or pmi2; else the mpirun of mpi4py's MPI library"
        raise BadInput(Problem("MPI", mpi.Get_library_version().split(",")[0].strip("\0\n "), wrong, mend))
    with executor_of(mpi.COMM_WORLD, root=0) as executor:
        if executor is None:
            yield None
            return
        with ThreadPoolExecutor(1) as own:
            yield Pool([_Crew(executor, 2 * (size - 1)), _Crew(own, 1)], size)


def _import_mpi() -> tuple[Any, Any]:
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        mend = "install Open MPI or MPICH on every host, or start one process without mpirun"
        raise BadInput(Problem("MPI", None, f"mpi4py finds no MPI library ({said})", mend)) from None
    return MPI, MPICommExecutor
