"""What wandb has written into a run's file, read back: LevelDB's log format, with protobuf records in it."""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK, _HEADER = 32768, 7
_PATIENCE = 60.0
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def payloads(content: bytes) -> Iterator[bytes]:
    """Each whole record's bytes; its parts stand in blocks of 32 KiB, each behind checksum, length and kind."""
    place, parts = _HEADER, b""
    assert content[:4] == b":W&B"
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        part = content[place + _HEADER : place + _HEADER + length]
        if len(part) < length:
            return  # being written
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind])))
        place += _HEADER + length
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield parts


def records(run: Path) -> dict[str, list[Any]]:
    """The records of the one offline run in the folder of a run, by kind, to the last one: wandb's process may still be
    at work on it when the run is finished."""
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + _PATIENCE
    while "exit" not in (found := _parsed(path.read_bytes())):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)
    return found


def _parsed(content: bytes) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for payload in payloads(content):
        record = pb.Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def values(items: Any) -> dict[str, Any]:
    """Of a record's items, by name."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
