"""fp16's loss scale, on DeepSpeed's own keepers of it: that of ZeRO, and that of the optimizer at stage 0."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler

from distill.loss_scale import LossScale


def of_zero(scale: float, least: float = 2.0) -> Any:
    settings = {"scale_window": 2, "min_scale": least, "delayed_shift": 1, "consecutive_hysteresis": False}
    return SimpleNamespace(loss_scaler=DynamicLossScaler(init_scale=scale, **settings))


def of_stage_0(scale: float, least: float = 2.0) -> Any:
    arguments = {"init_scale": scale, "scale_window": 2, "min_scale": least}
    return SimpleNamespace(loss_scale_config=LossScaleConfig(torch.float16, True, 1.0, arguments))


def overflow(scaler: Any) -> None:
    """What DeepSpeed does after gradients that overflow; its own function needs a process group to say so."""
    scaler.cur_scale = max(scaler.cur_scale / scaler.scale_factor, scaler.min_scale)
    scaler.last_overflow_iter = scaler.cur_iter
    scaler.cur_iter += 1


KEEPERS = pytest.mark.parametrize("optimizer_of", [of_zero, of_stage_0])


@KEEPERS
def test_an_overflow_is_nothing_unusual_while_the_scale_can_fall(optimizer_of: Any) -> None:
    assert [LossScale(optimizer_of(scale)).had_room for scale in (8.0, 4.0, 2.0)] == [True, True, False]


def test_a_fixed_scale_has_no_room() -> None:
    assert not LossScale(SimpleNamespace(loss_scaler=LossScaler(8.0))).had_room
    fixed = LossScaleConfig(torch.float16, False, 8.0, None)
    assert not LossScale(SimpleNamespace(loss_scale_config=fixed)).had_room


def test_whether_there_was_room_is_of_before_the_step() -> None:
    optimizer = of_zero(4.0)
    scale = LossScale(optimizer)
    overflow(optimizer.loss_scaler)
    assert (scale.value, scale.had_room) == (2.0, True)
    scale.note()
    assert not scale.had_room


def test_at_its_least_deepspeed_does_not_end_the_run() -> None:
    """Whether it must end is for `fault.max_bad_steps` to say."""
    optimizer = of_zero(2.0)
    assert optimizer.loss_scaler.raise_error_at_min_scale
    LossScale(optimizer)
    assert not optimizer.loss_scaler.raise_error_at_min_scale


def test_a_step_that_failed_for_another_reason_costs_no_scale() -> None:
    optimizer = of_zero(8.0)
    scaler, scale = optimizer.loss_scaler, LossScale(optimizer)
    scaler.update_scale(False)
    scale.note()
    overflow(scaler)
    scale.restore()
    assert (scale.value, scaler.cur_iter, scaler.last_overflow_iter) == (8.0, 1, -1)
    scaler.update_scale(False)
    assert scale.value == 8.0
    scaler.update_scale(False)
    assert scale.value == 16.0, "DeepSpeed doubles after its window without an overflow: there was none"
