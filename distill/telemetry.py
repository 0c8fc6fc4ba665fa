"""One flat record of namespaced metrics a step: all of it in metrics.jsonl and wandb, a few figures on the console."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from tqdm import tqdm

from distill.config import Config
from distill.whereabouts import here

Mode = Literal["online", "offline", "disabled"]
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


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

    def __init__(self, config: Config, is_writer: bool, start_step: int, wandb_id: str | None):
        self.folder, self.is_writer = config.run.folder, is_writer
        self.wandb_id: str | None = None
        self._bar: Any = None
        self._wandb: Any = None
        if not is_writer:
            return
        for name in (METRICS, SAMPLES):
            _forget_after(self.folder / name, start_step)
        self._wandb = _start_wandb(config, wandb_id)
        self.wandb_id = self._wandb.id if self._wandb else None
        self._timed = config.optim.max_minutes is not None
        total = config.optim.max_minutes * 60 if config.optim.max_minutes else config.optim.steps
        self._bar = tqdm(total=round(total), desc=self.folder.name, unit="s" if self._timed else "step", smoothing=0.1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one record; `step` counts finished optimizer steps."""
        if not self.is_writer:
            return
        _append(self.folder / METRICS, {"step": step, **metrics})
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
                _append(self.folder / SAMPLES, {"step": step, **row})

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self._bar is not None:
            self._bar.write(text)

    def close(self) -> None:
        """Finish the bar and the wandb run."""
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
                self.say(f"distill: wandb is lost ({type(error).__name__}: {error}); {METRICS} has everything")


_ON_THE_BAR = ("loss/total", "student/reverse_kl", "reward/mean", "valid/loss", "valid/rouge_l")


def progress(total: int, what: str, is_writer: bool) -> Any:
    """A bar with time left, for anything that may take longer than a few seconds."""
    return tqdm(total=total, desc=what, unit="row", disable=not is_writer, leave=False)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _forget_after(path: Path, step: int) -> None:
    """Drop records past `step`: a resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    beside = path.with_suffix(".new")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    beside.rename(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # a line cut off by a kill


def _start_wandb(config: Config, wandb_id: str | None) -> Any:
    mode: Mode | Literal["auto"] = config.log.wandb
    if mode == "disabled":
        return None
    import wandb

    if mode == "auto":
        keyed = os.environ.get("WANDB_API_KEY") or _has_wandb_login()
        mode = cast(Mode, os.environ.get("WANDB_MODE") or ("online" if keyed else "offline"))
    return wandb.init(
        project=config.log.project,
        name=config.run.folder.name,
        dir=config.run.folder,
        config=config.model_dump(mode="json"),
        id=wandb_id,
        resume="allow" if wandb_id else None,
        mode=mode,
        settings=wandb.Settings(silent=True, console="off"),
    )


def _has_wandb_login() -> bool:
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
