"""Things that may be meant, and that the doctor says all the same: the schedule, changed settings, a slow precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_configs import change, checkpoint, started

from distill.config import Config
from distill.doctor import examine

AVX2 = {"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}


def notices(config: dict[str, Any]) -> list[str]:
    """What is said of a run with which nothing is wrong, but for what is said of `good`."""
    report = examine(Config.model_validate(config), 2)
    assert not report.problems
    return [line for line in report.notices if "no pad token" not in line]


def optim(good: dict, **changes: object) -> dict:
    return good | {"optim": good["optim"] | changes}


def test_a_warm_up_that_outlasts_the_run(good: dict) -> None:
    """The peak comes at step `warmup_steps`, counted from 0: the last one of 51 has it."""
    told = "optim.warmup_steps = 50: the run has 4 steps; its learning rate rises to 8% of optim.lr and no further"
    assert notices(optim(good, warmup_steps=50, steps=4)) == [told]
    assert notices(optim(good, warmup_steps=50, steps=51)) == []
    (line,) = notices(optim(good, warmup_steps=50, steps=50))
    assert "the run has 50 steps; its learning rate rises to 98% of" in line
    assert notices(optim(good, warmup_steps=0, steps=1)) == []


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_falling_rate_in_a_run_that_ends_by_the_clock(good: dict, schedule: str) -> None:
    assert notices(optim(good, schedule=schedule)) == []
    found = notices(optim(good, schedule=schedule, max_minutes=5))
    told = (
        f"optim.schedule = '{schedule}': it goes by steps; where optim.max_minutes = 5 ends the run before its last "
        "step, the learning rate has not fallen to 0"
    )
    assert found == ([] if schedule == "constant" else [told])


def test_settings_that_a_run_goes_on_with_are_named(good: dict) -> None:
    """Each with what it was; where the run lies is no setting of it, and what stays is not named."""
    started(good)
    moved = change(good, "run.folder", good["run"]["folder"] + "-moved")
    Path(good["run"]["folder"]).rename(moved["run"]["folder"])
    assert notices(moved) == []
    changed = optim(moved, steps=9, max_minutes=2.5) | {
        "log": {"every": 7},
        "evaluation": {"every": 3, "prompts": 5},
        "checkpoint": {"keep": 1},
        "fault": {"max_bad_steps": 4},
        "parallel": {"timeout_minutes": 30},
    }
    names = {
        "optim.steps 2 → 9",
        "optim.max_minutes None → 2.5",
        "parallel.timeout_minutes 120.0 → 30.0",
        "evaluation.every 0 → 3",
        "evaluation.prompts 64 → 5",
        "checkpoint.keep 2 → 1",
        "fault.max_bad_steps 10 → 4",
        "log.every 1 → 7",
    }
    (line,) = notices(changed)
    start = f"the run in {moved['run']['folder']} goes on with other settings: "
    assert line.startswith(start)
    assert set(line.removeprefix(start).split(", ")) == names


@pytest.mark.parametrize(("schedule", "now"), [("linear", "0.0005"), ("cosine", "0.0005"), ("constant", None)], ids=str)
def test_another_schedule_is_said_with_the_next_steps_rate(good: dict, schedule: str, now: str | None) -> None:
    """Half of the peak at step 5 of 8, where the schedule of 4 steps had come to 0."""
    given = optim(good, lr=1e-3, schedule=schedule, steps=4)
    started(given)
    checkpoint(Path(good["run"]["folder"]), 4, world_size=2)
    found = notices(optim(given, steps=8))
    assert "optim.steps 4 → 8" in found[0]
    told = (
        f"optim.steps: another {schedule} schedule, of 8 steps instead of 4; step 5 trains at the rate {now}, not at 0"
    )
    assert found[1:] == ([told] if now else [])
    assert notices(given) == []


@pytest.mark.parametrize("feature", [None, "avx512_bf16", "amx_bf16"])
def test_bf16_on_a_processor_without_its_instructions(
    feature: str | None, good: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX2 | ({feature: True} if feature else {}))
    told = (
        "precision = bf16: this processor has no bf16 instructions, its products may take a hundred times as long as "
        "in fp32; auto takes fp32 here"
    )
    assert notices(good | {"precision": "bf16"}) == ([] if feature else [told])
    assert notices(good | {"precision": "auto"}) == notices(good | {"precision": "fp32"}) == []
