"""One flat record of namespaced metrics a step: all of it in metrics.jsonl and wandb, a few figures on the console."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar, cast

from tqdm import tqdm

from distill.checkpoint.disk import replace_file
from distill.config import Config
from distill.records_file import Records
from distill.whereabouts import here

T = TypeVar("T")
Mode = Literal["online", "offline", "disabled"]
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
_WANDB_ID = "wandb-id"


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
        self._wandb: Any = None
        if not is_writer:
            return
        self._metrics, self._samples = (Records(self.folder / name, start_step) for name in (METRICS, SAMPLES))
        self._wandb = _start_wandb(config)
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
        self._tell_wandb(lambda run: run.log(metrics, step=step))
        shown = {name: metrics[name] for name in _ON_THE_BAR if name in metrics}
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)

    def advance(self, step: int, seconds: float) -> None:
        """So many optimizer steps and seconds of training are done; the bar shows whichever ends the run."""
        if self._bar is not None:
            self._bar.update(min(round(seconds) if self._timed else step, self._bar.total) - self._bar.n)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write example rollouts as text."""
        if self.is_writer:
            for row in rows:
                self._samples.append({"step": step, **_finite(row)})

    def flush(self) -> None:
        """Wait until what was logged is on disk: a checkpoint at this step will not bring it again."""
        for records in (self._metrics, self._samples) if self.is_writer else ():
            try:
                records.flush()
            except OSError as error:
                warn(f"{records.path.name} waits for the disk: {error}")

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.write(text)

    def alert(self, title: str, text: str) -> None:
        """A warning on the console, and an alert of wandb, which sends one of a title a minute at most."""
        if self.is_writer:
            warn(text)
        self._tell_wandb(lambda run: run.alert(title=title, text=text, level="WARN"))

    def close(self) -> None:
        """Finish the bar and the wandb run."""
        self.flush()
        if self._bar is not None:
            self._bar.close()
        self._tell_wandb(lambda run: run.finish())

    def _tell_wandb(self, say: Callable[[Any], object]) -> None:
        """The run goes on without wandb where its process is gone: who ends ranks may end that first."""
        if self._wandb:
            try:
                say(self._wandb)
            except Exception as error:
                self._wandb = None
                warn(f"wandb is lost ({type(error).__name__}: {error}); {METRICS} has everything")


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


def _start_wandb(config: Config) -> Any:
    mode: Mode | Literal["auto"] = config.log.wandb
    if mode == "disabled":
        return None
    import wandb

    if mode == "auto":
        keyed = os.environ.get("WANDB_API_KEY") or _has_wandb_login()
        mode = cast(Mode, os.environ.get("WANDB_MODE") or ("online" if keyed else "offline"))
    # In a file of its own: a run killed before its first checkpoint is the same run too.
    id_file = config.run.folder / _WANDB_ID
    wandb_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
    try:
        run = wandb.init(
            project=config.log.project,
            name=config.run.folder.name,
            dir=config.run.folder,
            config=config.model_dump(mode="json"),
            id=wandb_id or None,
            resume="allow" if wandb_id else None,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:
        # Its server may be out of reach for a day; what it would show can be sent later.
        warn(f"wandb does not start ({type(error).__name__}: {error}); {METRICS} has everything")
        return None
    replace_file(id_file, run.id.encode())
    return run


def _has_wandb_login() -> bool:
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
