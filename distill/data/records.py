"""Tokenised records on disk: one Arrow dataset and one `records.json` a folder.

`records.json` holds the tokenizer's fingerprint, the settings and the counts of what was kept, cut and dropped, so a
folder says what it is and can refuse a tokenizer that did not write it.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

import datasets
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from distill.errors import BadInput, Problem

MANIFEST = "records.json"
VERSION = 1
"""Of the form of a folder of records."""
Kind = Literal["instructions", "text"]

WRITTEN_BY_A_MODEL = "kept: written by a model"
"""The count of records whose response names its writer, as `data_prep.teacher_responses` does."""

INSTRUCTION_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "references": datasets.List(datasets.Value("string")),
        "prompt_ids": datasets.List(datasets.Value("int32")),
        "response_ids": datasets.List(datasets.Value("int32")),
    }
)
TEXT_FEATURES = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the tokenizer does to text: its vocabulary with ids, its EOS, and its cut of a probe sentence."""
    probe = "The 2 quick brown foxes don't jump over naïve 日本 dogs.\n\tEnd of text 12345 !?"
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer.encode(probe)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


class RecordSettings(BaseModel):
    """How the records were made."""

    tokenizer: str
    template: str
    max_prompt: int
    max_length: int
    data: list[str]


class Manifest(BaseModel):
    """The content of `records.json`."""

    version: int = VERSION
    kind: Kind
    tokenizer: str
    """Fingerprint of the tokenizer that wrote the records."""
    settings: RecordSettings
    counts: dict[str, int]


def read_manifest(folder: Path, field: str) -> Manifest:
    """The folder's `records.json`.

    Raises:
        BadInput: `folder` was not written by `make preprocess`; names the setting `field`.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        reason = "no such folder" if not Path(folder).exists() else f"no {MANIFEST} in it"
        raise BadInput(Problem(field, str(folder), reason, "write it with `make preprocess`"))
    again = "run `make preprocess` again"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValueError:
        raise BadInput(Problem(field, str(path), "damaged", again)) from None
    except OSError as error:
        raise BadInput(Problem(field, str(path), f"cannot be read ({error.strerror or error})", again)) from None
    if manifest.version != VERSION:
        wrong = f"records of version {manifest.version}, this is distill for version {VERSION}"
        raise BadInput(Problem(field, str(path), wrong, again))
    return manifest


def open_records(folder: Path, kind: Kind, field: str) -> datasets.Dataset:
    """Memory-map a folder's records.

    Raises:
        BadInput: the folder holds the other kind of records, none, or not those of its manifest, or its Arrow files
            are damaged.
    """
    manifest = read_manifest(folder, field)
    if manifest.kind != kind:
        wrong = f"holds {manifest.kind} records"
        raise BadInput(Problem(field, str(folder), wrong, f"give a folder of {kind} records"))
    try:
        _check_files(Path(folder))
        rows = datasets.load_from_disk(str(folder))
        expected = (INSTRUCTION_FEATURES if kind == "instructions" else TEXT_FEATURES).arrow_schema
        shown = rows.format["columns"], rows.format["type"]
        if not rows.data.schema.equals(expected) or shown != (expected.names, None):
            raise ValueError(f"its columns are not those of {kind} records")
    # Of damaged metadata `datasets` and Arrow let any error through.
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        mend = "run `make preprocess` again"
        raise BadInput(Problem(field, str(folder), f"damaged records ({said})", mend)) from None
    kept = manifest.counts.get("kept")
    if len(rows) != kept or not len(rows):
        wrong = f"holds {len(rows)} records, {MANIFEST} says {kept}" if len(rows) != kept else "holds no record"
        raise BadInput(Problem(field, str(folder), wrong, "run `make preprocess` again"))
    return rows


def _check_files(folder: Path) -> None:
    """See that the dataset is made of files of its own folder.

    Raises:
        ValueError: it names others.
    """
    state = json.loads((folder / datasets.config.DATASET_STATE_JSON_FILENAME).read_bytes())
    for file in state["_data_files"]:
        name = str(file["filename"])
        if Path(name).name != name:
            raise ValueError(f"its list of files leads out of the folder, to {name[:200]!r}")
