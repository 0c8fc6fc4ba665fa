"""Folders that appear whole."""

import shutil
from pathlib import Path


def replace_folder(new: Path, final: Path) -> None:
    """Put the finished folder `new` in the place of `final`, whose old content is set aside first and removed last."""
    share_files(new)
    recover_folder(final)
    aside = _aside(final)
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


def share_files(folder: Path) -> None:
    """Give the files below the rights that the folder has by the user's umask; safetensors writes them for us alone."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o666 != readable:
            path.chmod(readable)
