"""Saves a run beside its training: copied at a step's end, written meanwhile, made a checkpoint at a later one."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distill.checkpoint.catalog import CHECKPOINTS, PARTIAL, Found, RunState, prune, publish, tag_of
from distill.checkpoint.disk import FileRecord
from distill.checkpoint.tensor_file import TensorFile
from distill.checkpoint.writer import FileWriter
from distill.topology import Topology

# Headers, alignment, the manifest.
_OVERHEAD = 1.05
_PER_FILE_BYTES = 64 << 10


@dataclass
class Saver:
    """Writes a run's checkpoints; every rank holds one. A disk that is full costs a checkpoint, not the run."""

    folder: Path
    topology: Topology
    ranks_on_host: int
    keep: int
    say: Callable[[str], None]
    """Prints an error of rank 0's."""
    saved: str | None = None
    """Tag of the newest checkpoint of this run."""
    _underway: tuple[RunState, FileWriter] | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is begun and not yet one; the same on every rank."""
        return self._underway is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's files are not yet on disk."""
        return self._underway is not None and self._underway[1].writing

    def begin(self, state: RunState, contents: Mapping[str, TensorFile]) -> None:
        """Begin a checkpoint of `contents`, this rank's state by file name. Collective.

        They may change as soon as this returns.
        """
        self.finish()
        partial = self.folder / CHECKPOINTS / (tag_of(state.step) + PARTIAL)
        refused = self._make_room(partial, contents)
        if refused is None:
            self._underway = state, FileWriter(partial, contents, self.ranks_on_host)
        elif self.topology.is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            self.say(f"{tag_of(state.step)} is not saved: {refused}; {self._what_remains()}")

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one, and make it one. Collective."""
        if self._underway is None:
            return
        state, writer = self._underway
        writer.wait()
        self._underway = None
        if writer.error is not None and not isinstance(writer.error, OSError):
            raise writer.error
        outcomes = self.topology.gather_objects((writer.records, str(writer.error) if writer.error else None))
        if not self.topology.is_writer:
            return
        failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        files = {name: record for records, _ in outcomes for name, record in records.items()}
        self._settle(state, files, failures)

    def _settle(self, state: RunState, files: dict[str, FileRecord], failures: list[str]) -> None:
        root, tag = self.folder / CHECKPOINTS, tag_of(state.step)
        try:
            if failures:
                raise OSError("; ".join(failures[:3]))
            publish(root, Found(tag, state, self.topology.world_size, self.topology.tp_size, files))
        except OSError as error:
            shutil.rmtree(root / (tag + PARTIAL), ignore_errors=True)
            self.say(f"{tag} is not saved: {error}; {self._what_remains()}")
            return
        self.saved = tag
        try:
            prune(root, tag, self.keep, state.best_step)
        except OSError as error:
            self.say(f"old checkpoints stay: {error}")

    def _make_room(self, partial: Path, contents: Mapping[str, TensorFile]) -> str | None:
        """Make the folder; why there will be no checkpoint, if so. The same answer on every rank."""
        size, free, error = sum(file.bytes + _PER_FILE_BYTES for file in contents.values()), 0, None
        if self.topology.is_writer:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                free = shutil.disk_usage(partial).free
            except OSError as caught:
                error = str(caught)
        sizes, frees, errors = zip(*self.topology.gather_objects((size, free, error)), strict=True)
        if errors[0] is not None:
            return str(errors[0])
        needed = sum(sizes) * _OVERHEAD
        return None if needed <= frees[0] else f"it takes {needed / 1e9:.3g} GB, the disk has {frees[0] / 1e9:.3g}"

    def _what_remains(self) -> str:
        return f"the run goes on, {self.saved} stays" if self.saved else "the run goes on without a checkpoint so far"
