"""Whether the run can write where it shall."""

import os

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
