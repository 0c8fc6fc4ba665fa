"""One rank's files of one checkpoint, copied off the model at once and written while the training goes on."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from distill.checkpoint.disk import FileRecord, write_file
from distill.checkpoint.tensor_file import TensorFile, serialise
from distill.host import free_host_memory_bytes

# Of the memory free on the host, shared by its ranks, a copy of the state may take so much.
_MOST_OF_FREE_MEMORY = 0.5


class FileWriter:
    """Writes `contents`, by file name, into `folder`.

    The copy takes host memory; where that is short, the files are written before this returns.
    """

    def __init__(self, folder: Path, contents: Mapping[str, TensorFile], ranks_on_host: int):
        self.records: dict[str, FileRecord] = {}
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        free = free_host_memory_bytes() / ranks_on_host
        if sum(content.bytes for content in contents.values()) > _MOST_OF_FREE_MEMORY * free:
            self._write(folder, contents)
            return
        copied = {name: replace(file, tensors=_copies(file.tensors)) for name, file in contents.items()}
        self._thread = threading.Thread(target=self._write, args=(folder, copied), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether it is still at it."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until all files are on disk, or one could not be written: then `error` says why."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, folder: Path, contents: Mapping[str, TensorFile]) -> None:
        try:
            for name, content in contents.items():
                self.records[name] = write_file(folder / name, partial(serialise, content))
        except BaseException as error:  # raised where the training hears of it
            self.error = error


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()
        for name, tensor in tensors.items()
    }
