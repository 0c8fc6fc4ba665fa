"""TensorBoard: event files in the run folder, for `tensorboard --logdir`."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from distill.dashboards.board import Dashboard
from distill.dashboards.glimpse import ROLLOUTS, Glimpse

TENSORBOARD = "tensorboard"
"""The folder in that of the run."""
_BINS = 64


class TensorboardBoard(Dashboard):
    """Every start of a run writes a file of its own; the steps that it does again are purged from the earlier ones."""

    name = "TensorBoard"

    def __init__(self, folder: Path, start_step: int):
        """`start_step` is the last that stays."""
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=start_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, glimpse: Glimpse) -> None:
        """Rollouts as text, distributions as histograms."""
        for name, values in glimpse.distributions.items():
            if values.size:
                self._writer.add_histogram(name, values, step, bins=_BINS)
        if glimpse.rows:
            # Indented, Markdown leaves them as they are.
            text = "\n\n".join(_indented(row) for row in glimpse.rows)
            self._writer.add_text(ROLLOUTS, text, step)

    def flush(self) -> None:
        """Wait for the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _indented(row: Mapping[str, object]) -> str:
    lines = json.dumps(dict(row), ensure_ascii=False, indent=1).splitlines()
    return "\n".join(f"    {line}" for line in lines)
