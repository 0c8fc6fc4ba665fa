"""Whether the run can write what it shall, and where."""

import os
from importlib.util import find_spec

from distill.checks.report import Report
from distill.config import Config


def check_run_folder(config: Config, report: Report) -> None:
    """The run folder is there or can be made; rank 0 alone would find out otherwise, and the others wait for it."""
    folder = config.run.folder
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a link to nothing"
        wrong = f"is {kind}" if nearest == folder else f"{nearest} is {kind}"
        report.check(False, "run.folder", str(folder), wrong, "name another folder")
        return
    writable = os.access(nearest, os.W_OK | os.X_OK)
    report.check(writable, "run.folder", str(folder), f"{nearest} is not writable", "change its rights or name another")


def check_dashboards(config: Config, report: Report) -> None:
    """TensorBoard's package is there where its files are asked for; it is no requirement otherwise."""
    there = not config.log.tensorboard or find_spec("tensorboard") is not None
    mend = "pip install tensorboard, or remove it"
    report.check(there, "log.tensorboard", config.log.tensorboard, "tensorboard is not installed", mend)
