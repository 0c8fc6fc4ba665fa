"""Run by the DeepSpeed launcher from test_gathering.py: the same rollouts gathered once and layer by layer.

deepspeed --num_accelerators N tests/ranks/gather_modes.py --local_rank=K MODELS OUT DEEPSPEED_JSON
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.config import ModelSettings, OptimSettings, RolloutSettings
from distill.console import leave, quiet_libraries
from distill.data.loading import token_batch
from distill.deepspeed_settings import read_deepspeed_json
from distill.engine import Engine
from distill.rollout.worker import RolloutWorker
from distill.topology import start, stop

LIMIT = 24


class EndAt:
    """Rank 0's rows end at once, those of the last rank late; nobody's at the limit."""

    def __init__(self, rank: int):
        self.at = 3 + 8 * rank

    def __call__(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.full((len(rows),), tokens.shape[1] >= self.at, dtype=torch.bool)


def main() -> None:
    models, out, deepspeed_json = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    topology = start()
    student, teacher = (
        Engine(
            ModelSettings(path=f"{models}/{name}"),
            read_deepspeed_json(Path(deepspeed_json)),
            torch.float32,
            topology,
            500,
            optim=OptimSettings(steps=1) if name == "student" else None,
        )
        for name in ("student", "teacher")
    )
    calls = [0]
    student.module.base_model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    rows = torch.arange(5) * topology.dp_size + topology.dp_rank
    prompts = token_batch([{"prompt_ids": [7, int(row) + 1, 9], "response_ids": []} for row in rows])
    found: dict[str, object] = {}
    for coins in ("shared", "per_row"):
        for gather in ("once", "layer", "auto"):
            settings = RolloutSettings(max_new_tokens=LIMIT, alpha=0.4, coins=coins, gather=gather, batch=3)
            worker = RolloutWorker(student, teacher, settings, EndAt(topology.rank), 0, topology)
            calls[0], started = 0, time.perf_counter()
            rollouts = worker.collect(prompts, rows, 0)
            released = all(
                parameter.data.numel() == 0
                for engine in (student, teacher)
                for parameter in engine.module.parameters()
                if not parameter.ds_persist
            )
            found[f"{coins} {gather}"] = {
                "seconds": time.perf_counter() - started,
                "ids": rollouts.response_ids.tolist(),
                "lengths": rollouts.response_lengths.tolist(),
                "teacher": rollouts.teacher_logprobs.tolist(),
                "released": released,
                "missing": student.missing_bytes,
                "calls": calls[0],
                "once": worker.choice.once if worker.choice else None,
            }
    everyone = topology.gather_objects(found)
    if topology.is_writer:
        Path(out).write_text(json.dumps(everyone))
    topology.barrier()
    stop()


main()
leave(0)
