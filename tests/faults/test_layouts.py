"""Ranks that do not come back: a run goes on with fewer, more, or otherwise arranged ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledger import Ledger
from lives import Nursery

from runs import figures, note_end

TP: dict[str, Any] = {"student_tp": 2, "teacher_tp": 2}
OFFLOAD = {"deepspeed": "ds_configs/zero3_offload.json"}
ZERO0 = '{"zero_optimization": {"stage": 0}}'
# Ranks and settings of three lives of three steps each; and how near the figures must be to those of 2 ranks at ZeRO-3.
CHANGES: dict[str, tuple[list[tuple[int, dict[str, Any]]], dict[str, Any], float]] = {
    "2, 1, 4 ranks, ZeRO-3": ([(2, {}), (1, {}), (4, {})], {}, 1e-5),
    "2, 1, 4 ranks, ZeRO-2": ([(2, {}), (1, {}), (4, {})], {"deepspeed": "ds_configs/zero2.json"}, 1e-5),
    "2, 1, 4 ranks, ZeRO-1": ([(2, {}), (1, {}), (4, {})], {"deepspeed": "ds_configs/zero1.json"}, 1e-5),
    "2, 1, 2 ranks, in host memory": (
        [(2, {}), (1, {}), (2, {})],
        {"deepspeed": "ds_configs/zero3_offload.json"},
        1e-5,
    ),
    "TP 2, TP 1, TP 2, ZeRO-3": ([(2, TP), (1, {}), (2, TP)], {}, 1e-5),
    "TP 2, TP 1, TP 2, ZeRO-1": ([(2, TP), (1, {}), (2, TP)], {"deepspeed": "ds_configs/zero1.json"}, 1e-5),
    "TP 2 × DP 2, 1, 2 ranks": ([(4, TP), (1, {}), (2, {})], {}, 1e-5),
    "teacher TP 2, 1, teacher TP 2": ([(2, {"teacher_tp": 2}), (1, {}), (4, {"teacher_tp": 2})], {}, 1e-5),
    "ZeRO-3, ZeRO-2, ZeRO-0": (
        [(2, {}), (2, {"deepspeed": "ds_configs/zero2.json"}), (2, {"deepspeed": "{zero0}"})],
        {},
        1e-5,
    ),
}


@pytest.fixture(scope="module")
def whole(recipe: Callable, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    nursery.live(recipe(folder, "minillm", optim=OPTIM | {"steps": 9}, evaluation=NEVER)).must_end(0, 0)
    return folder / "run"


OPTIM = {"schedule": "constant", "weight_decay": 0.1}
NEVER = {"every": 0}


@pytest.mark.parametrize("change", CHANGES)
def test_losses_continue_within_rounding(
    change: str, whole: Path, recipe: Callable, nursery: Nursery, ledger: Ledger, tmp_path: Path
) -> None:
    """fp32. A round of rollouts is under way at both changes."""
    lives, parallel, near = CHANGES[change]
    (tmp_path / "zero0.json").write_text(ZERO0)
    fault = ledger[f"another layout of ranks: {change}"]
    fault.compared = False
    for number, (ranks, its) in enumerate(lives):
        settings = parallel | {
            k: v.format(zero0=tmp_path / "zero0.json") if k == "deepspeed" else v for k, v in its.items()
        }
        optim = OPTIM | {"steps": 3 * (number + 1)}
        config = recipe(tmp_path, "minillm", optim=optim, evaluation=NEVER, parallel=settings)
        life = nursery.live(config, ranks=ranks)
        assert life.codes == [0] * ranks, life.said[-3000:]
        if number:
            note_end(fault, 0.0, life.orphans)
            assert "dealt out anew" in life.said
    ours, theirs = ([row for row in figures(run) if "loss/total" in row] for run in (tmp_path / "run", whole))
    assert [row["step"] for row in ours] == list(range(1, 10))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss/total", "student/reverse_kl", "optim/grad_norm", "rollout/response_length"):
            assert one[name] == pytest.approx(other[name], rel=near), (one["step"], name)
