"""Folders that appear whole."""

import shutil
from pathlib import Path


def replace_folder(new: Path, final: Path) -> None:
    """Put the finished folder `new` in the place of `final`, whose old content is set aside first and removed last."""
    aside = final.with_name(final.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    new.rename(final)
    shutil.rmtree(aside, ignore_errors=True)
