"""A copy of the sources in which one mistake at a time is made and taken back."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from distill.errors import BadInput, Problem
from tools.mutation.entries import Mutant

_PYTHON = ".venv"
"""Environment that `make` would otherwise make anew in every copy."""


def source_files(project: Path) -> list[str]:
    """List the files that git knows or would add, as paths within the project.

    Raises:
        BadInput: git does not know the folder.
    """
    command = ["git", "-C", str(project), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(Problem("--project", str(project), "is no git checkout", "clone the project with git"))
    return [name for name in sorted(set(done.stdout.split("\0")) - {""}) if (project / name).is_file()]


class Copy:
    """One worker's sources, and a folder for the temporary files of its tests."""

    def __init__(self, project: Path, names: Sequence[str], folder: Path):
        self.sources, self.temporary = folder / "sources", folder / "tmp"
        for name in names:
            target = self.sources / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project / name, target)
        if (project / _PYTHON).is_dir():
            (self.sources / _PYTHON).symlink_to(project / _PYTHON)
        self.digests = {name: _digest(self.sources / name) for name in names}
        self.empty()
        self._changes = 0
        self._changed: tuple[Path, bytes, os.stat_result] | None = None

    @property
    def tree(self) -> str:
        """A hash of all sources."""
        return hashlib.sha256(repr(sorted(self.digests.items())).encode()).hexdigest()

    def mutate(self, mutant: Mutant) -> None:
        """Make the mistake."""
        path = self.sources / mutant.file
        self._changed = path, path.read_bytes(), path.stat()
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.find, mutant.replace), encoding="utf-8")
        # Python tells by length and seconds whether its bytecode is stale: no two versions share a time.
        self._changes += 1
        os.utime(path, (10**9 + self._changes,) * 2)

    def restore(self) -> None:
        """Take the mistake back, and what tests have left in the temporary folder."""
        if self._changed is not None:
            path, content, before = self._changed
            path.write_bytes(content)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            self._changed = None
        self.empty()

    def empty(self) -> None:
        """Remove temporary files."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True, exist_ok=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
