"""Every rank killed at once, as when a node dies: on the way into each phase, and at each file operation."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ledger import Ledger
from lives import Nursery

from runs import newest_whole, note_comparison, note_end, note_loss

TP = {"parallel": {"student_tp": 2, "teacher_tp": 2}}
ZERO2 = {"parallel": {"deepspeed": "ds_configs/zero2.json"}}
OFFLOAD = {"parallel": {"deepspeed": "ds_configs/zero3_offload.json"}}
LAYOUTS = {"ZeRO-3": {}, "ZeRO-2": ZERO2, "TP 2": TP}
OBJECTIVES = ("sft", "kd", "minillm", "distillm")
VARIANTS = {f"{objective}, {layout}": (objective, LAYOUTS[layout]) for objective in OBJECTIVES for layout in LAYOUTS}
VARIANTS |= {
    "minillm, ZeRO-3 in host memory": ("minillm", {"parallel": {"deepspeed": "ds_configs/zero3_offload.json"}})
}
VARIANTS |= {f"minillm, {layout}, bf16": ("minillm", LAYOUTS[layout] | {"precision": "bf16"}) for layout in LAYOUTS}
# On the way into which phase of which step; a checkpoint is written every second step. Each run takes one of the two.
PHASES = (
    (("forward", 1), ("save", 4), ("optimizer", 6)),
    (("backward", 3), ("validation", 4), ("minibatch", 8)),
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_in_every_phase(
    variant: str, recipe: Callable, nursery: Nursery, ledger: Ledger, tmp_path: Path
) -> None:
    objective, changes = VARIANTS[variant]
    whole, broken = recipe(tmp_path / "whole", objective, **changes), recipe(tmp_path / "broken", objective, **changes)
    nursery.live(whole).must_end(0, 0)
    fault, run, newest = ledger[f"all ranks killed in a phase: {variant}"], tmp_path / "broken/run", 0
    for phase, step in PHASES[list(VARIANTS).index(variant) % 2]:
        life = nursery.live(broken, order={"rank": step % 2, "how": "kill all", "phase": phase, "step": step})
        assert set(life.codes) == {-9}, f"{phase} {step}: {life.codes}\n{life.said[-3000:]}"
        note_end(fault, life.seconds, life.orphans)
        newest = note_loss(fault, run, newest)
    last = nursery.live(broken)
    fault.corrupted += last.codes != [0, 0]
    assert last.codes == [0, 0], last.said[-3000:]
    assert not note_comparison([fault], run, tmp_path / "whole/run")
    assert fault.lost == fault.orphans == 0
    assert max(fault.steps_lost) <= 2


SHORT = {"optim": {"steps": 2}, "evaluation": {"every": 1}, "checkpoint": {"every": 1, "keep": 1}}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_at_every_file_operation(
    rank: int, recipe: Callable, nursery: Nursery, ledger: Ledger, tmp_path: Path
) -> None:
    """A run of 2 steps that saves after each, killed at its first operation, its second, … ; what each leaves is taken
    to the end."""
    whole, broken = recipe(tmp_path / "whole", "minillm", **SHORT), recipe(tmp_path / "broken", "minillm", **SHORT)
    run = tmp_path / "broken/run"
    counting = {"rank": rank, "how": "count", "operation": 0, "folder": str(tmp_path / "whole/run")}
    life = nursery.live(whole, order=counting)
    assert life.codes == [0, 0]
    total = max(int(number) for number in re.findall(r"operation (\d+)", life.said))
    fault, newest = ledger[f"all ranks killed at a file operation of rank {rank}"], 0
    for number in range(1, total + 1):
        order = counting | {"how": "kill all", "operation": number, "folder": str(run)}
        life = nursery.live(broken, order=order)
        if life.codes == [0, 0]:
            # What the one before has left was taken to the end in fewer operations: begin anew.
            assert not note_comparison([fault], run, tmp_path / "whole/run"), number
            shutil.rmtree(run)
            newest = 0
            life = nursery.live(broken, order=order)
        assert set(life.codes) == {-9}, f"{number}: {life.codes}\n{life.said[-3000:]}"
        note_end(fault, life.seconds, life.orphans)
        newest = note_loss(fault, run, newest)
        assert fault.lost == 0, number
    last = nursery.live(broken)
    fault.corrupted += last.codes != [0, 0]
    assert last.codes == [0, 0], last.said[-3000:]
    assert not note_comparison([fault], run, tmp_path / "whole/run")
    assert newest_whole(run) == 2
    assert fault.injected == total > (20 if rank else 60)
