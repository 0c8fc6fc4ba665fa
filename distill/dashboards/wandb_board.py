"""wandb: figures over steps, tokens or seconds, tables of rollouts, histograms, alerts, and a summary of the run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import wandb

from distill.checkpoint.disk import replace_file
from distill.config import Config
from distill.dashboards.board import Dashboard
from distill.dashboards.glimpse import ROLLOUTS, Glimpse
from distill.data.folders import share_files

_ID = "wandb-id"
_STAGING = "WANDB_DATA_DIR"
_BINS = 64
STEP = "step"
"""The x axis of every figure, unless a panel asks for another."""


class WandbBoard(Dashboard):
    """A run of wandb's. Its id stands in the run folder: what resumes the run goes on with it."""

    name = "wandb"

    def __init__(self, config: Config):
        """Start it, or take it up again.

        Raises:
            Exception: of wandb's, where its server is out of reach.
        """
        # In a file of its own: a run killed before its first checkpoint is the same run too.
        self._folder = config.run.folder
        id_file = self._folder / _ID
        known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        self._run: Any = wandb.init(
            project=config.log.project,
            name=self._folder.name,
            dir=self._folder,
            config=config.model_dump(mode="json"),
            id=known or None,
            resume="allow" if known else None,
            mode=_mode(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        replace_file(id_file, self._run.id.encode())
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Into the row of that step."""
        self._run.log({STEP: step, **metrics}, step=step)

    def show(self, step: int, glimpse: Glimpse) -> None:
        """A table, and a histogram of each distribution."""
        shown: dict[str, Any] = {
            name: wandb.Histogram(np_histogram=np.histogram(values, _BINS))
            for name, values in glimpse.distributions.items()
            if values.size
        }
        if glimpse.rows:
            columns = glimpse.columns
            rows = [[step, *(row.get(name) for name in columns)] for row in glimpse.rows]
            shown[ROLLOUTS] = wandb.Table([STEP, *columns], rows)
        with _staged_in(self._folder):
            self._run.log({STEP: step, **shown}, step=step)

    def summarise(self, facts: Mapping[str, float | str]) -> None:
        """Columns of the table of runs."""
        self._run.summary.update(dict(facts))

    def alert(self, title: str, text: str) -> None:
        """wandb sends one of a title a minute at most."""
        self._run.alert(title=title, text=text, level="WARN")

    def close(self) -> None:
        """Wait until all is sent, or in the file."""
        self._run.finish()


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """While the block lasts wandb puts copies of tables under `folder`, a run's, rather than under the user's home:
    `wandb sync` reads them there, from any host that sees the run. They get the rights that other files have."""
    if _STAGING in os.environ:
        yield
        return
    os.environ[_STAGING] = str(folder.absolute() / "wandb")
    try:
        yield
    finally:
        share_files(Path(os.environ.pop(_STAGING)))


def _mode(config: Config) -> Literal["online", "offline", "disabled"]:
    if config.log.wandb != "auto":
        return config.log.wandb
    return cast(Any, os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline"))


def has_key() -> bool:
    """Whether there is a key for wandb's server: in the environment, or from `wandb login`."""
    import netrc

    try:
        return bool(os.environ.get("WANDB_API_KEY")) or any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
