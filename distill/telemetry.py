"""One flat record of namespaced metrics a step: in metrics.jsonl and on dashboards, a few figures on the console."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from tqdm import tqdm

from distill.config import Config
from distill.dashboards.board import Dashboard
from distill.dashboards.glimpse import Glimpse, distributions
from distill.data.batches import Rollouts
from distill.records_file import Records
from distill.whereabouts import here

T = TypeVar("T")
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
# Steps between two looks of dashboards at rollouts: each is a file of wandb's.
_BETWEEN_GLIMPSES = 10


class _Console:
    """stderr for a bar and the lines above it: what a full disk refuses is not shown, and costs no more than that."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def __eq__(self, other: object) -> bool:
        # tqdm asks: for a terminal's width, and whether a bar is in the way of a line.
        return other is self or other is sys.stderr

    def __hash__(self) -> int:
        return id(self)


_console: Any = _Console()


class Stopwatch:
    """Seconds spent in each named phase since the last `lap`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add this block's wall time to `name`."""
        started = time.perf_counter()
        with here.within(name):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """`time/NAME` in seconds, and start again from 0."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}


class Telemetry:
    """The one writer. Every rank may hold one; only the writer's does anything."""

    def __init__(self, config: Config, is_writer: bool, start_step: int):
        self.folder, self.is_writer = config.run.folder, is_writer
        self._bar: Any = None
        self._boards: list[Dashboard] = []
        self._shown: int | None = None
        if not is_writer:
            return
        self._metrics, self._samples = (Records(self.folder / name, start_step) for name in (METRICS, SAMPLES))
        self._boards = list(_open_boards(config, start_step))
        self._timed = config.optim.max_minutes is not None
        total = config.optim.max_minutes * 60 if config.optim.max_minutes else config.optim.steps
        unit = "s" if self._timed else "step"
        self._bar = tqdm(total=round(total), desc=self.folder.name, unit=unit, smoothing=0.1, file=_console)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one record; `step` counts finished optimizer steps. Figures that are not finite are left out."""
        if not self.is_writer:
            return
        metrics = _finite(metrics)
        self._metrics.append({"step": step, **metrics})
        self._tell(lambda board: board.log(step, metrics))
        shown = {name: metrics[name] for name in _ON_THE_BAR if name in metrics}
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)

    def advance(self, step: int, seconds: float) -> None:
        """So many optimizer steps and seconds of training are done; the bar shows whichever ends the run."""
        if self._bar is not None:
            self._bar.update(min(round(seconds) if self._timed else step, self._bar.total) - self._bar.n)

    def samples(self, step: int, rows: list[dict[str, Any]], rollouts: Rollouts) -> None:
        """Write example rollouts as text, `rows`. Now and then dashboards get them too, and the distributions of all
        that this rank has sampled, `rollouts`."""
        if not self.is_writer:
            return
        rows = [_finite(row) for row in rows]
        for row in rows:
            self._samples.append({"step": step, **row})
        if self._boards and (self._shown is None or step - self._shown >= _BETWEEN_GLIMPSES):
            self._shown, glimpse = step, Glimpse(rows, distributions(rollouts))
            self._tell(lambda board: board.show(step, glimpse))

    def summarise(self, facts: Mapping[str, float | str]) -> None:
        """What dashboards shall say of the run as a whole, so far."""
        self._tell(lambda board: board.summarise(facts))

    def conclude(self, step: int, why: str) -> None:
        """A record that the run is over before its last step, and why."""
        if self.is_writer:
            self._metrics.append({"step": step, "ended": why})

    def flush(self) -> None:
        """Wait until what was logged is on disk: a checkpoint at this step will not bring it again."""
        for records in (self._metrics, self._samples) if self.is_writer else ():
            try:
                records.flush()
            except OSError as error:
                warn(f"{records.path.name} waits for the disk: {error}")
        self._tell(lambda board: board.flush())

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.write(text)

    def alert(self, title: str, text: str) -> None:
        """A warning on the console, and an alert of wandb."""
        if self.is_writer:
            warn(text)
        self._tell(lambda board: board.alert(title, text))

    def close(self) -> None:
        """Finish the bar and the dashboards."""
        self.flush()
        if self._bar is not None:
            self._bar.close()
        self._tell(lambda board: board.close())

    def _tell(self, say: Callable[[Dashboard], object]) -> None:
        """The run goes on without a dashboard that fails: who ends ranks may end wandb's process first."""
        for board in list(self._boards):
            try:
                say(board)
            except Exception as error:
                self._boards.remove(board)
                warn(f"{board.name} is lost ({type(error).__name__}: {error}); {METRICS} has everything")


_ON_THE_BAR = ("loss/total", "student/reverse_kl", "reward/mean", "valid/loss", "valid/rouge_l")


def warn(text: str) -> None:
    """An error that the run survives: a line on the console, above any progress bar."""
    tqdm.write(f"distill: {text}", file=_console)


def progress(total: int, what: str, is_writer: bool) -> Any:
    """A bar with time left, for anything that may take longer than a few seconds."""
    return tqdm(total=total, desc=what, unit="row", disable=not is_writer, leave=False, file=_console)


def _finite(record: dict[str, T]) -> dict[str, T]:
    """Without numbers that JSON does not know."""
    return {name: value for name, value in record.items() if not isinstance(value, float) or math.isfinite(value)}


def _open_boards(config: Config, start_step: int) -> Iterator[Dashboard]:
    """Those that the settings ask for. wandb's server may be out of reach for a day: then the run goes on without."""
    if config.log.wandb != "disabled":
        from distill.dashboards.wandb_board import WandbBoard

        try:
            yield WandbBoard(config)
        except Exception as error:
            warn(f"wandb does not start ({type(error).__name__}: {error}); {METRICS} has everything")
    if config.log.tensorboard:
        from distill.dashboards.tensorboard_board import TensorboardBoard

        try:
            yield TensorboardBoard(config.run.folder, start_step)
        except OSError as error:
            warn(f"TensorBoard does not start ({error}); {METRICS} has everything")
