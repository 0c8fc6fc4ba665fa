"""Run by the DeepSpeed launcher from test_ranks.py: two optimizer steps and a validation, many times; write what
came out.

deepspeed --num_accelerators N tests/ranks/two_steps.py --local_rank=K CONFIG JOBS

JOBS is a JSON list of {"out": PATH, "overrides": [section.key=value, …]}, all of one tensor-parallel degree.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.config import Config, load
from distill.console import leave, quiet_libraries
from distill.topology import Topology, start, stop
from distill.trainer import Run


def main() -> None:
    config_path, jobs_path = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    jobs = json.loads(Path(jobs_path).read_text())
    configs = [load(config_path, job["overrides"]) for job in jobs]
    topology = start(configs[0].tensor_parallel)
    for job, config in zip(jobs, configs, strict=True):
        two_steps(config, job["out"], topology)
    stop()


def two_steps(config: Config, out: str, topology: Topology) -> None:
    run = Run(config, topology)
    topology = run.topology
    figures = [run.step() for _ in range(2)]
    assert run.validation is not None
    validation = run.validation.run()
    weights = run.student.state_dict()
    rollouts = run.source.in_use()
    sampled = []
    if rollouts is not None:
        mine = [
            (index * topology.dp_size + topology.dp_rank, ids[:length])
            for index, (ids, length) in enumerate(
                zip(rollouts.response_ids.tolist(), rollouts.response_lengths.tolist(), strict=True)
            )
        ]
        # Ranks of one replica hold the same rows; each row counts once.
        sampled = sorted(dict(row for part in topology.gather_objects(mine) for row in part).items())
    if topology.is_writer:
        assert weights is not None
        save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, f"{out}.safetensors")
        Path(f"{out}.json").write_text(json.dumps({"figures": figures, "validation": validation, "sampled": sampled}))
    topology.barrier()
    run.telemetry.close()


main()
leave(0)
