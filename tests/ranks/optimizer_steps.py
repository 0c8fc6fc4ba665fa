"""Run by test_schedule_and_groups.py on one rank: optimizer steps of a model on one batch, resumed with other settings.

python tests/ranks/optimizer_steps.py FOLDER

FOLDER holds `model`, and `jobs.json`: a list of {"name", "deepspeed": PATH, "rows": [{"prompt_ids", "response_ids"}],
"legs": [{"optim": {}, "count": N}]}. Each leg takes N steps and goes on from the checkpoint of the one before. Written
are `NAME.json`, the rate and the norm of every step, and `NAME-K.safetensors`, the weights after step K.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.checkpoint.disk import write_file
from distill.checkpoint.shard_files import content, restore_same
from distill.checkpoint.tensor_file import serialise
from distill.config import ModelSettings, OptimSettings
from distill.console import leave, quiet_libraries
from distill.data.loading import token_batch
from distill.deepspeed_settings import read_deepspeed_json
from distill.engine import Engine
from distill.objectives.supervised import Sft
from distill.topology import Topology, start, stop

VOCAB = 40


def main(folder: Path) -> None:
    quiet_libraries()
    topology = start()
    for job in json.loads((folder / "jobs.json").read_text()):
        steps: list[dict[str, float]] = []
        for leg in job["legs"]:
            take(leg, job, steps, folder, topology)
        (folder / f"{job['name']}.json").write_text(json.dumps(steps))
    stop()


def take(
    leg: dict[str, Any], job: dict[str, Any], steps: list[dict[str, float]], folder: Path, topology: Topology
) -> None:
    """The steps of one leg, added to `steps`."""
    settings, shard = read_deepspeed_json(Path(job["deepspeed"])), folder / f"{job['name']}.shard"
    optim = OptimSettings(**leg["optim"])
    engine = Engine(ModelSettings(path=str(folder / "model")), settings, torch.float32, topology, VOCAB, 1, optim)
    if steps:
        with engine.reloaded():
            restore_same(engine.shards, shard)
    batch = token_batch(job["rows"])
    for _ in range(leg["count"]):
        terms = engine.loss(batch, lambda student: Sft().loss(student, None, batch))
        engine.accumulate(terms.total, batch.response_lengths.sum())
        steps.append({"rate": engine.learning_rate, "norm": engine.step()})
        weights = engine.state_dict()
        assert weights is not None
        copies = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
        save_file(copies, folder / f"{job['name']}-{len(steps)}.safetensors")
    write_file(shard, lambda file: serialise(content(engine.shards), file))


main(Path(sys.argv[1]))
leave(0)
