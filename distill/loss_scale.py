"""fp16's loss scale, which DeepSpeed halves when gradients overflow and doubles when they have not for long."""

from typing import Any


class LossScale:
    """What an optimizer of DeepSpeed keeps of it."""

    def __init__(self, optimizer: Any):
        zero = hasattr(optimizer, "loss_scaler")
        self._keeper = optimizer.loss_scaler if zero else optimizer.loss_scale_config
        self._dynamic = "dynamic" if zero else "dynamic_loss_scale"
        self._least = "min_scale" if zero else "min_loss_scale"
        # At its least it would end the run; whether that must be is ours to say.
        self._keeper.raise_error_at_min_scale = False
        self.note()

    @property
    def value(self) -> float:
        """Of the next step."""
        return float(self._keeper.cur_scale)

    @property
    def had_room(self) -> bool:
        """Whether it could still fall when it was noted: gradients that overflow then are nothing unusual."""
        before = self._before
        return bool(before[self._dynamic]) and before["cur_scale"] > before[self._least]

    def note(self) -> None:
        """Before a step, remember it."""
        self._before = dict(vars(self._keeper))

    def restore(self) -> None:
        """As it was noted: the step failed, but not for its scale."""
        vars(self._keeper).update(self._before)
