"""What `python -m distill plan` says of memory and traffic, against runs on real ranks.

Each layout takes two MiniLLM steps with a round of rollouts each; the second is measured. `state`: weights, gradients
and optimizer of both models, ideally 1/ranks of what one rank holds. `peak`: of each phase, in tensors. `sent`: what
collectives send in a ring. On a few cores times are a record, no result.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from deepspeed.accelerator import get_accelerator

from distill.config import load
from distill.planning.plan import Plan
from distill.planning.setup import Cluster, prepare
from tools.benchmarks.random_run import write_run

LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))
_SHAPE = {"vocab_size": 32000, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
# 58 M and 127 M parameters: sizes at which weights outweigh what else there is.
_SHAPES: dict[str, dict[str, Any]] = {
    "student": _SHAPE | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
    "teacher": _SHAPE | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
}
_SETTINGS: dict[str, Any] = {
    "objective": {"name": "minillm"},
    "optim": {"steps": 4, "batch_size": 8, "micro_batch": 2},
    "rollout": {"per_round": 8, "batch": 8, "max_new_tokens": 64, "inner_epochs": 1, "gather": "once"},
}
_STATE = ("student weights", "teacher weights", "student gradients", "optimizer")
_ALLOWANCE = "CUDA, NCCL (allowance)"


def layouts(text: str) -> list[tuple[int, int]]:
    """Ranks and tensor-parallel degree of each, as argparse's `type`."""
    pairs = [part.partition("x") for part in text.split(",")]
    return [(int(ranks), int(tp)) for ranks, _, tp in pairs]


def run(args: argparse.Namespace) -> dict[str, object]:
    """`plan_memory_error_max`, `bytes_over_theory_max`, `state_over_ideal_max`, and a row of figures a layout."""
    shapes = _SHAPES
    if args.layers:
        shapes = {name: shape | {"num_hidden_layers": args.layers} for name, shape in _SHAPES.items()}
    on_cpu = get_accelerator().device_name() == "cpu"
    most = max(ranks for ranks, _ in args.layouts) if on_cpu else get_accelerator().device_count()
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_run(Path(folder), shapes, args.prompt, _SETTINGS)
        rows = [
            _layout(recipe, ranks, tp, "cpu" if on_cpu else "cuda", args.overrides)
            for ranks, tp in args.layouts
            if ranks <= most
        ]
    return _summary(rows) | {"layouts": rows}


def _layout(recipe: Path, ranks: int, tp: int, device: Any, given: list[str]) -> dict[str, Any]:
    """One layout measured, and planned."""
    folder = recipe.parent / f"ranks-{ranks}-tp-{tp}"
    overrides = [f"parallel.student_tp={tp}", f"parallel.teacher_tp={tp}", f"run.folder={folder}", *given]
    out = recipe.parent / f"{folder.name}.json"
    command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(_free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run(
        [*command, "--module", "tools.benchmarks.scale_rank", str(recipe), str(out), *overrides],
        env=environment,
        check=True,
        stdout=sys.stderr,
    )
    found = json.loads(out.read_text(encoding="utf-8"))
    cluster = Cluster(1, ranks, psutil.virtual_memory().total, 1e12, 1e9, 1e9, 1e9, device)
    plan = Plan.of(prepare(load(recipe, overrides), cluster))
    return compare(found, plan)


def compare(found: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """A row: of the fullest rank what was measured, and what was planned. On a processor offloading moves nothing."""
    memory, on_cpu = plan.memory, plan.setup.cluster.device == "cpu"
    state = memory.state | memory.host
    aside = sum(memory.host.values()) if on_cpu else -memory.state[_ALLOWANCE]
    peaks = {phase: max(rank["peak_bytes"][phase] for rank in found) for phase in memory.phases}
    planned = {phase: memory.of(phase) + aside for phase in memory.phases}
    sent = max(sum(rank["sent_bytes"].values()) for rank in found)
    theory = plan.sent_per_step
    row: dict[str, Any] = {
        "ranks": plan.setup.cluster.ranks,
        "tp": plan.setup.student.tp,
        "teacher_tp": plan.setup.teacher.tp if plan.setup.teacher else 0,
        "state_bytes": max(rank["state_bytes"] for rank in found),
        "plan_state_bytes": round(sum(state.get(name, 0) for name in _STATE)),
        "peak_bytes": max(peaks.values()),
        "plan_peak_bytes": round(max(planned.values())),
        "plan_memory_error": max(planned.values()) / max(peaks.values()) - 1,
        "sent_bytes": sent,
        "theory_bytes": round(theory),
        # One rank sends nothing.
        "bytes_over_theory": sent / theory if theory else float(sent > 0) + 1,
    }
    for phase, peak in peaks.items():
        row |= {f"peak_{phase}_bytes": peak, f"plan_{phase}_error": planned[phase] / peak - 1}
    seconds = {name: max(rank["seconds"][name] for rank in found) for name in found[0]["seconds"]}
    row |= {f"{name.removeprefix('time/')}_seconds": value for name, value in seconds.items()}
    return row | {"resident_gib": max(rank["resident_gib"] for rank in found)}


def _summary(rows: list[dict[str, Any]]) -> dict[str, object]:
    whole = rows[0]["state_bytes"] * rows[0]["ranks"]
    for row in rows:
        row["state_over_ideal"] = row["state_bytes"] / (whole / row["ranks"])
    phases = [abs(row[name]) for row in rows for name in row if name.startswith("plan_") and name.endswith("_error")]
    return {
        "plan_memory_error_max": max(abs(row["plan_memory_error"]) for row in rows),
        "plan_phase_error_max": max(phases),
        "bytes_over_theory_max": max(row["bytes_over_theory"] for row in rows),
        "bytes_over_theory_min": min(row["bytes_over_theory"] for row in rows),
        "state_over_ideal_max": max(row["state_over_ideal"] for row in rows),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
