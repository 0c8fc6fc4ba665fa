"""Folders that appear whole."""

import shutil
from pathlib import Path


def replace_folder(new: Path, final: Path) -> None:
    """Put the finished folder `new` in the place of `final`, whose old content is set aside first and removed last."""
    aside = _aside(final)
    recover_folder(final)
    if final.exists():
        final.rename(aside)
    new.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """After a kill within `replace_folder`: take back the old content if the new is not in its place."""
    aside = _aside(final)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(final)


def _aside(final: Path) -> Path:
    return final.with_name(final.name + ".old")
