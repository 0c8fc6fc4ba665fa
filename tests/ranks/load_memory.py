"""Run by the DeepSpeed launcher from test_loading.py: the memory of its own that a rank takes to load a model.

deepspeed --num_accelerators N tests/ranks/load_memory.py --local_rank=K MODEL OUT
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.config import ModelSettings
from distill.console import leave, quiet_libraries
from distill.engine import Engine
from distill.topology import start, stop


def main() -> None:
    small, large, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    topology = start()

    def load(path: str) -> Engine:
        zero3 = {"zero_optimization": {"stage": 3}}
        return Engine(ModelSettings(path=path), zero3, torch.bfloat16, topology, 1000)

    load(small)  # what is imported and started once does not count
    before, stopped = anonymous_bytes(), threading.Event()
    highest = [before]

    def watch() -> None:
        while not stopped.is_set():
            highest[0] = max(highest[0], anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    engine = load(large)
    stopped.set()
    watcher.join()
    sizes = [parameter.ds_numel * parameter.element_size() for parameter in engine.module.parameters()]
    found = {"peak": highest[0] - before, "model": sum(sizes), "largest": max(sizes)}
    everyone = topology.gather_objects(found)
    if topology.is_writer:
        Path(out).write_text(json.dumps(everyone))
    stop()


def anonymous_bytes() -> int:
    """Resident memory that is no file's: weights read through a memory map are the page cache's."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(kilobytes) * 1024


main()
leave(0)
