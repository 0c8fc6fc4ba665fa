"""Gathering once against fetching layer by layer, on ZeRO-3 ranks. Started by `tools.benchmark rollout`.

deepspeed --num_accelerators 2 --module tools.benchmarks.gather FOLDER REPEATS ROWS NEW_TOKENS
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.config import ModelSettings, RolloutSettings
from distill.console import leave, quiet_libraries
from distill.deepspeed_settings import resolve_dtype
from distill.engine import Engine
from distill.rollout.worker import RolloutWorker
from distill.topology import start, stop
from tools.benchmarks.models import SMOLLM2_135M, open_pair, random_prompts
from tools.benchmarks.timing import interleaved

_RANKS, _OUT = 2, "gather.json"
_VOCAB = int(SMOLLM2_135M["vocab_size"])
# As in ds_configs/zero3.json: small tensors stay whole on every rank.
_ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3}}


def figures(rows: int, new_tokens: int, repeats: int) -> dict[str, object]:
    """`gather_once_speedup` of a small pair of models, and whether both ways sample the same."""
    models = open_pair(None, None, "cpu", resolve_dtype("auto"))
    with tempfile.TemporaryDirectory() as folder:
        for name, model in zip(("student", "teacher"), models, strict=True):
            model.save_pretrained(Path(folder) / name)
        command = ["deepspeed", "--num_accelerators", str(_RANKS), "--module", "tools.benchmarks.gather"]
        numbers = [str(number) for number in (repeats, rows, new_tokens)]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        subprocess.run([*command, folder, *numbers], env=environment, check=True, stdout=sys.stderr)
        found: dict[str, object] = json.loads((Path(folder) / _OUT).read_text())
        return found


def main() -> None:
    """What every rank does."""
    folder, *numbers = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    repeats, rows, new_tokens = map(int, numbers)
    quiet_libraries()
    topology = start()
    student, teacher = (
        Engine(ModelSettings(path=f"{folder}/{name}"), _ZERO3, resolve_dtype("auto"), topology, _VOCAB)
        for name in ("student", "teacher")
    )
    prompts = random_prompts(rows, 32, _VOCAB, seed=topology.rank)
    found: dict[str, list[Any]] = {"once": [], "layer": []}

    def collect(gather: Any) -> None:
        settings = RolloutSettings(max_new_tokens=new_tokens, gather=gather, batch=rows)
        worker = RolloutWorker(student, teacher, settings, lambda tokens, alive: alive < 0, 0, topology)
        found[gather].append(worker.collect(prompts, torch.arange(rows), 0).response_ids.tolist())

    times = interleaved({gather: partial(collect, gather) for gather in found}, repeats)
    medians = {name: statistics.median(took) for name, took in times.items()}
    same = all(topology.gather_objects(found["once"] == found["layer"]))
    if topology.is_writer:
        result = {
            "gather_once_speedup": medians["layer"] / medians["once"],
            "gather_tokens_identical": same,
            "gather_ranks": topology.world_size,
            "gather_new_tokens": new_tokens,
            **{f"gather_{name}_seconds": value for name, value in medians.items()},
        }
        (Path(folder) / _OUT).write_text(json.dumps(result))
    topology.barrier()
    stop()


if __name__ == "__main__":
    main()
    leave(0)
