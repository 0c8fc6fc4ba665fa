"""Folders that appear whole."""

import shutil
from pathlib import Path


def replace_folder(new: Path, final: Path) -> None:
    """Put the finished folder `new` in the place of `final`, whose old content is set aside first and removed last."""
    share_files(new)
    aside = final.with_name(final.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    new.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def share_files(folder: Path) -> None:
    """Give the files below the rights that the folder has by the user's umask; safetensors writes them for us alone."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o666 != readable:
            path.chmod(readable)
