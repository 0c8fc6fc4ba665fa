"""Files that appear whole, and the files of a Hugging Face dataset."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa

UNFINISHED = ".new"
"""Ending of a file that is being written."""


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A path to write to; what lies there at the end takes the place of `path` at once."""
    # Ranks of other hosts may be at the same file, after a run that was cut off from its launcher.
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    with in_place_of(path) as partial:
        partial.write_text(text, encoding="utf-8")


class RowWriter:
    """Rows into one Arrow file of the form that `datasets` maps into memory."""

    def __init__(self, stream: pa.RecordBatchStreamWriter, schema: pa.Schema):
        self._stream = stream
        self.schema = schema

    def write_batch(self, rows: pa.RecordBatch) -> None:
        """Rows of the file's schema; none is fine."""
        if rows.num_rows:
            self._stream.write_batch(rows)


@contextmanager
def row_writer(path: Path, features: datasets.Features) -> Iterator[RowWriter]:
    """A writer of such rows to `path`."""
    schema = features.arrow_schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        yield RowWriter(stream, schema)


def describe_dataset(folder: Path, files: list[str], features: datasets.Features, fingerprint: str) -> None:
    """Make a folder of Arrow files one that `datasets.load_from_disk` opens, in the order of `files`."""
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": features.to_dict(), "homepage": "", "license": ""}
    for name, content in (
        (datasets.config.DATASET_STATE_JSON_FILENAME, state),
        (datasets.config.DATASET_INFO_FILENAME, info),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
