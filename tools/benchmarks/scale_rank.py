"""What every rank of `tools.benchmark scale` does: two steps of a run, the second one measured.

deepspeed --num_accelerators N --module tools.benchmarks.scale_rank RECIPE OUT section.key=value …
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from distill.config import load
from distill.console import leave, quiet_libraries
from distill.engine import Engine
from distill.host import peak_memory_gib
from distill.telemetry import Stopwatch
from distill.topology import start, stop
from distill.trainer import Run
from tools.benchmarks.meter import Meter

# The trainer's phases, by the plan's.
_PHASES = {"minibatch": "rollouts", "forward": "loss", "backward": "loss", "optimizer": "update"}


class MeteredWatch(Stopwatch):
    """Notes the peak of each phase beside its time."""

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter = meter
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Start the peak anew, time the block, keep the largest."""
        accelerator, meter = get_accelerator(), self.meter
        on_cpu = accelerator.device_name() == "cpu"
        meter.restart()
        if not on_cpu:
            accelerator.reset_peak_memory_stats()
        with super().phase(name):
            yield
        peak = meter.peak if on_cpu else accelerator.max_memory_allocated()
        which = _PHASES[name]
        self.peaks[which] = max(self.peaks.get(which, 0), peak)


def state_bytes(*engines: Engine) -> int:
    """Bytes of the storages that weights, gradients and optimizer state lie in, on this rank."""
    tensors: list[Any] = []
    for engine in engines:
        for parameter in engine.module.parameters():
            tensors += [parameter.data, getattr(parameter, "ds_tensor", None), parameter.grad]
        # DeepSpeed has no public way to these.
        optimizer = engine._ds.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "bit16_groups_flat"):
            for group in getattr(optimizer, name, []):
                tensors += [group, group.grad]
        tensors.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
        # A frozen model has an optimizer in name only.
        moments = getattr(getattr(optimizer, "optimizer", None), "state", {})
        tensors += [value for of_group in moments.values() for value in of_group.values()]
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)
    }
    return sum(storages.values())


def main() -> None:
    """Measure and write one JSON for all ranks."""
    recipe, out, *overrides = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    with Meter() as meter:
        config = load(recipe, overrides)
        topology = start(config.tensor_parallel, config.parallel.timeout_minutes)
        run = Run(config, topology)
        run.step()  # makes the optimizer's state
        run.watch = run.updater.watch = watch = MeteredWatch(meter)
        meter.sent.clear()
        run.step()
        sent = dict(meter.sent)
    assert run.teacher
    found = topology.gather_objects(
        {
            "state_bytes": state_bytes(run.student, run.teacher.engine),
            "peak_bytes": watch.peaks,
            "sent_bytes": sent,
            "seconds": watch.lap(),
            "resident_gib": peak_memory_gib(),
            "device": topology.device.type,
        }
    )
    if topology.is_writer:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    run.telemetry.close()
    topology.barrier()
    stop()


if __name__ == "__main__":
    main()
    leave(0)
