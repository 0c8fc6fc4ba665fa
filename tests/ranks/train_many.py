"""Run by the DeepSpeed launcher from test_objectives.py: several runs one after the other, to start the ranks once.

deepspeed --num_accelerators N tests/ranks/train_many.py --local_rank=K JOBS

JOBS is a JSON list: {"config": YAML} trains; {"rewind": RUN, "to": TAG, "kept": COPY} copies a finished run and takes
it back to a checkpoint, as if it had been killed some steps later.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.config import load
from distill.console import leave, quiet_libraries
from distill.topology import start, stop
from distill.trainer import train


def rewind(run: Path, tag: str, kept: Path) -> None:
    shutil.copytree(run, kept)
    for later in (run / "checkpoints").glob("step-*"):
        if later.name > tag:
            shutil.rmtree(later)
    (run / "checkpoints" / "latest").write_text(tag)


def main() -> None:
    (jobs,) = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    topology = start()
    for job in json.loads(Path(jobs).read_text()):
        if "config" in job:
            train(load(job["config"]), topology)
        elif topology.is_writer:
            rewind(Path(job["rewind"]), job["to"], Path(job["kept"]))
        topology.barrier()
    stop()


main()
leave(0)
