"""Run by the DeepSpeed launcher from test_endings.py: `distill train`, in which one rank does something else at a step.

deepspeed --num_accelerators N tests/ranks/broken.py --local_rank=K FAULT RANK STEP --config CONFIG

FAULT is `raises`, `memory` or `hangs`.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.cli import main
from distill.console import leave


def break_at(fault: str, step: int) -> None:
    from distill.update import Updater

    whole = Updater.step

    def broken(self: Updater, *batches: object) -> dict[str, float]:
        from distill.whereabouts import here

        if here.step == step:
            with self.watch.phase("forward"):
                if fault == "hangs":
                    time.sleep(600)
                if fault == "memory":
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
                raise ZeroDivisionError("broken on purpose")
        return whole(self, *batches)  # type: ignore[arg-type]

    Updater.step = broken  # type: ignore[method-assign]


flags = [argument for argument in sys.argv[1:] if argument.startswith("--local_rank")]
fault, rank, step, *rest = [argument for argument in sys.argv[1:] if argument not in flags]
if os.environ["RANK"] == rank:
    break_at(fault, int(step))
leave(main([*flags, "train", *rest]))
