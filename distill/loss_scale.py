"""fp16's loss scale, which DeepSpeed halves when gradients overflow and doubles when they have not for long."""

from typing import Any


class LossScale:
    """What an optimizer of DeepSpeed keeps of it."""

    def __init__(self, optimizer: Any):
        self._optimizer, self._of_zero = optimizer, hasattr(optimizer, "loss_scaler")
        self.note()

    @property
    def _keeper(self) -> Any:
        """Looked up each time: loading a checkpoint replaces it."""
        return self._optimizer.loss_scaler if self._of_zero else self._optimizer.loss_scale_config

    @property
    def value(self) -> float:
        """Of the next step."""
        return float(self._keeper.cur_scale)

    @property
    def had_room(self) -> bool:
        """Whether it could still fall when it was noted: gradients that overflow then are nothing unusual."""
        dynamic, least = ("dynamic", "min_scale") if self._of_zero else ("dynamic_loss_scale", "min_loss_scale")
        return bool(self._before[dynamic]) and self._before["cur_scale"] > self._before[least]

    def note(self) -> None:
        """Before a step, remember it."""
        # At its least it would end the run; whether that must be is ours to say.
        self._keeper.raise_error_at_min_scale = False
        self._before = dict(vars(self._keeper))

    def restore(self) -> None:
        """As it was noted: the step failed, but not for its scale."""
        vars(self._keeper).update(self._before)
