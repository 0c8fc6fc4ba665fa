"""Run by the DeepSpeed launcher from test_ranks.py: count how often ZeRO-3 gathers the lm_head around a loss.

deepspeed --num_accelerators N tests/ranks/head_gathers.py --local_rank=K MODEL OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import deepspeed.runtime.zero.partition_parameters as zero
import torch

from distill.config import ModelSettings, OptimSettings
from distill.console import leave, quiet_libraries
from distill.data.loading import token_batch
from distill.engine import Engine
from distill.objectives.supervised import Sft
from distill.topology import start, stop

# Nothing is too small to be sharded.
SHARD_ALL = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def main() -> None:
    path, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    topology = start()
    optim = OptimSettings(steps=3, batch_size=4, micro_batch=2)
    engine = Engine(ModelSettings(path=path), SHARD_ALL, torch.float32, topology, 600, 1, optim)
    sizes: list[int] = []
    gather = zero._dist_allgather_fn

    def counting(shard: torch.Tensor, whole: torch.Tensor, *rest: Any) -> Any:
        sizes.append(whole.numel())
        return gather(shard, whole, *rest)

    zero._dist_allgather_fn = counting
    # 398 tokens: several blocks go through the head.
    batch = token_batch([{"prompt_ids": [1, 2], "response_ids": list(range(3, 202))}] * 2)

    def take() -> list[int]:
        taken = sizes.copy()
        sizes.clear()
        return taken

    found: dict[str, list[list[int]]] = {"forward": [], "backward": []}
    for _ in range(3):
        terms = engine.loss(batch, lambda student: Sft().loss(student, None, batch))
        found["forward"].append(take())
        engine.accumulate(terms.total, torch.tensor(398.0))
        found["backward"].append(take())
        engine.step()
        take()
    if topology.is_writer:
        Path(out).write_text(json.dumps(found))
    topology.barrier()
    stop()


main()
leave(0)
