"""Folders of Arrow records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from bad_inputs.case import Case, Place, cut, edit
from data_prep.files import row_writer
from distill.data.records import INSTRUCTION_FEATURES, TEXT_FEATURES

_GOOD = {"id": "1", "prompt": "a", "references": ["b"], "prompt_ids": [1, 2], "response_ids": [3, 0]}


def _changed(name: str, expected: str, change: Callable[[Path], object], kind: str = "train") -> Case:
    """`data.train` with a change to its folder."""

    def command(place: Place) -> list[str]:
        folder = place.copied(kind)
        change(folder)
        return place.train(folder) if kind == "train" else place.doctor(data__plain_text=str(folder))

    field = "data.train" if kind == "train" else "data.plain_text"
    return Case(name, f"{field} = 'GIVEN/{kind}{expected}", command)


def _arrow(folder: Path) -> Path:
    return next(folder.glob("*.arrow"))


def _holding(*rows: dict[str, Any], count: int | None = None) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        with row_writer(_arrow(folder), INSTRUCTION_FEATURES) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(list(rows), schema=writer.schema))
        edit(folder / "records.json", counts={"kept": len(rows) if count is None else count})

    return change


def _other_columns(folder: Path) -> None:
    features = datasets.Features({"words": datasets.Value("string")})
    with row_writer(_arrow(folder), features) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([{"words": "a"}], schema=writer.schema))
    edit(folder / "dataset_info.json", features=features.to_dict())
    edit(folder / "records.json", counts={"kept": 1})


def _falling_offsets(folder: Path) -> None:
    """Lists whose lengths are negative."""
    offsets, values = pa.py_buffer(pa.array([0, 4, 2], pa.int32()).buffers()[1]), pa.array([1, 2, 3, 4], pa.int32())
    column = pa.ListArray.from_buffers(TEXT_FEATURES.arrow_schema.field(0).type, 2, [None, offsets], children=[values])
    with row_writer(_arrow(folder), TEXT_FEATURES) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([column], schema=writer.schema))
    edit(folder / "records.json", counts={"kept": 2})


def _state(folder: Path, **changes: Any) -> None:
    edit(folder / "state.json", **changes)


def _text(folder: Path, content: str) -> None:
    (folder / "records.json").write_text(content)


def _unequal_rows(folder: Path) -> None:
    with row_writer(_arrow(folder), TEXT_FEATURES) as writer:
        writer.write_batch(
            pa.RecordBatch.from_pylist([{"input_ids": [1]}, {"input_ids": [1, 2]}], schema=writer.schema)
        )
    edit(folder / "records.json", counts={"kept": 2})


_JSON = "/records.json'"
RECORDS = [
    Case("no such folder", "data.train = '/nowhere': no such folder", lambda p: p.train(Path("/nowhere"))),
    Case(
        "a raw file", "data.train = 'GIVEN/a.jsonl': no records.json in it", lambda p: p.train(p.file("a.jsonl", "{}"))
    ),
    _changed("no manifest", "': no records.json in it", lambda f: (f / "records.json").unlink()),
    _changed("half a manifest", f"{_JSON}: damaged", lambda f: cut(f / "records.json", 0.5)),
    _changed("an empty manifest", f"{_JSON}: damaged", lambda f: _text(f, "")),
    _changed("a list as a manifest", f"{_JSON}: damaged", lambda f: _text(f, "[]")),
    _changed("a number as counts", f"{_JSON}: damaged", lambda f: edit(f / "records.json", counts=3)),
    _changed("an unknown kind", f"{_JSON}: damaged", lambda f: edit(f / "records.json", kind="images")),
    _changed(
        "a manifest to come",
        f"{_JSON}: records of version 2, this is distill for version 1",
        lambda f: edit(f / "records.json", version=2),
    ),
    _changed("no Arrow file", "': damaged records", lambda f: _arrow(f).unlink()),
    _changed("an empty Arrow file", "': damaged records", lambda f: cut(_arrow(f), 0)),
    _changed("half an Arrow file", "': damaged records", lambda f: cut(_arrow(f), 0.5)),
    _changed("no Arrow at all", "': damaged records", lambda f: _arrow(f).write_bytes(b"not arrow" * 99)),
    _changed("no list of files", "': damaged records", lambda f: (f / "state.json").unlink()),
    _changed("half a list of files", "': damaged records", lambda f: cut(f / "state.json", 0.5)),
    _changed(
        "files of elsewhere",
        "': damaged records (its list of files leads out of the folder, to '../valid/",
        lambda f: _state(f, _data_files=[{"filename": "../valid/data-00000-of-00001.arrow"}]),
    ),
    _changed(
        "absolute files",
        "': damaged records (its list of files leads out of the folder, to '/etc/passwd'",
        lambda f: _state(f, _data_files=[{"filename": "/etc/passwd"}]),
    ),
    _changed("a number as files", "': damaged records", lambda f: _state(f, _data_files=3)),
    _changed("another format", "': damaged records (its columns are not", lambda f: _state(f, _format_type="numpy")),
    _changed("no column", "': damaged records (its columns are not", lambda f: _state(f, _format_columns=[])),
    _changed("other columns", "': damaged records (its columns are not those of instructions", _other_columns),
    _changed("no record", "': holds no record", _holding()),
    _changed("too few records", "': holds 1 records, records.json says 64", _holding(_GOOD, count=64)),
    _changed(
        "an id beyond the tokenizer",
        "': response_ids holds the id 9999, the tokenizer has 0 to 599",
        _holding(_GOOD | {"response_ids": [9999]}),
    ),
    _changed(
        "a negative id", "': prompt_ids holds the id -1, the tokenizer has 0 to", _holding(_GOOD | {"prompt_ids": [-1]})
    ),
    _changed("a prompt without a token", "': a prompt has no token", _holding(_GOOD | {"prompt_ids": []})),
    _changed("no list", "': damaged records (prompt_ids has gaps)", _holding(_GOOD | {"prompt_ids": None})),
    _changed("negative lengths", "': damaged records (", _falling_offsets, "text"),
    _changed("rows of unequal length", "': rows of 1 to 2 tokens, not 32", _unequal_rows, "text"),
    _changed(
        "another tokenizer",
        "': was tokenised by another tokenizer than the student's",
        lambda f: edit(f / "records.json", tokenizer="0123456789abcdef"),
    ),
    Case(
        "text for instructions",
        "holds text records; give a folder of instructions records",
        lambda p: p.train(p.records / "text"),
    ),
    Case("no responses", "data.train = 'GIVEN/train': 3 records have no response", lambda p: _without_responses(p)),
]


def _without_responses(place: Place) -> list[str]:
    folder = place.copied()
    counts = json.loads((folder / "records.json").read_text())["counts"]
    edit(folder / "records.json", counts=counts | {"kept: without a response": 3})
    return place.doctor(data__train=str(folder), objective={"name": "sft"}, rollout={})
