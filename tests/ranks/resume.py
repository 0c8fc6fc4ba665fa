"""Run by the DeepSpeed launcher from test_tensor_parallel.py: go on, and go on from the checkpoint; both step 3.

deepspeed --num_accelerators N tests/ranks/resume.py --local_rank=K CONFIG OUT

CONFIG saves every second step. The student is validated, and so written, at the first.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.config import load
from distill.console import leave, quiet_libraries
from distill.topology import start, stop
from distill.trainer import Run


def main() -> None:
    config_path, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    config = load(config_path)
    topology = start(config.tensor_parallel)
    run = Run(config, topology)
    for _ in range(2):
        run.log(run.step())
        run.maybe_validate()
        run.maybe_save()
    went_on = run.step()
    run.telemetry.close()
    again = Run(config, topology)
    resumed_at = again.state.step
    resumed = again.step()
    again.telemetry.close()
    found = {"went_on": went_on, "resumed": resumed, "resumed_at": resumed_at}
    everyone = topology.gather_objects(found)
    if topology.is_writer:
        Path(out).write_text(json.dumps(everyone))
    stop()


main()
leave(0)
