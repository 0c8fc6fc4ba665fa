"""Run by the DeepSpeed launcher: several runs one after the other, to start the ranks once.

deepspeed --num_accelerators N tests/ranks/train_many.py --local_rank=K JOBS

JOBS is a JSON list. {"config": YAML} trains. {"rewind": RUN, "to": TAG, "kept": COPY} copies a finished run and takes
it back to a checkpoint, as if it had been killed some steps later. {"seeds": YAML, "out": PATH, "keep": bool} writes
each rank's seed of torch's generator at the start of a run, of a fresh one unless its folder is kept.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.config import Config, load
from distill.console import leave, quiet_libraries
from distill.topology import Topology, start, stop
from distill.trainer import Run, train


def rewind(run: Path, tag: str, kept: Path) -> None:
    shutil.copytree(run, kept)
    for later in (run / "checkpoints").glob("step-*"):
        if later.name > tag:
            shutil.rmtree(later)
    (run / "checkpoints" / "latest").write_text(tag)


def write_seeds(config: Config, keep: bool, out: str, topology: Topology) -> None:
    if not keep:
        folder = config.run.folder.with_name(f"{config.run.folder.name} fresh")
        config = config.model_copy(update={"run": config.run.model_copy(update={"folder": folder})})
    run = Run(config, topology)
    seeds = topology.gather_objects(torch.initial_seed())
    run.telemetry.close()
    if topology.is_writer:
        Path(out).write_text(json.dumps(seeds))


def main() -> None:
    (jobs,) = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    # Processors without instructions for it compute in fp16 too, only slowly.
    get_accelerator().is_fp16_supported = lambda: True
    topology = start()
    for job in json.loads(Path(jobs).read_text()):
        if "config" in job:
            train(load(job["config"]), topology)
        elif "seeds" in job:
            write_seeds(load(job["seeds"]), job.get("keep", False), job["out"], topology)
        elif topology.is_writer:
            rewind(Path(job["rewind"]), job["to"], Path(job["kept"]))
        topology.barrier()
    stop()


main()
leave(0)
