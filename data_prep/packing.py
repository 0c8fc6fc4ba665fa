"""Plain text's second pass: the tokens of all shards, one after the other, cut into rows of equal length."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.files import in_place_of, row_writer
from distill.data.records import TEXT_FEATURES

_TOKENS_AT_ONCE = 2**18
_BYTES_OF_A_TOKEN = 4


@dataclass(frozen=True)
class Rows:
    """Rows that begin among one shard's tokens; the last of them may go on in the next shards."""

    sources: tuple[Path, ...]
    """Token files, int32; that shard's and those that the last row goes on in."""
    skip: int
    """Tokens of the first one that belong to the row before."""
    count: int


def plan_rows(files: list[Path], tokens: list[int], length: int) -> list[Rows]:
    """For each shard's file of so many tokens the rows that begin in it; those behind the last whole row are left."""
    begins = [0, *accumulate(tokens)]
    whole = begins[-1] // length
    plan = []
    for number, (begin, end) in enumerate(pairwise(begins)):
        first, last = -(-begin // length), min(-(-end // length), whole)
        count = max(last - first, 0)
        until = number + 1
        while count and begins[until] < last * length:
            until += 1
        plan.append(Rows(tuple(files[number:until]), first * length - begin if count else 0, count))
    return plan


def pack_shard(rows: Rows, length: int, out: Path) -> None:
    """Write the rows, each of exactly `length` tokens, to the Arrow file `out`, whole or not at all."""
    at_once = max(_TOKENS_AT_ONCE // length, 1)
    with in_place_of(out) as partial, row_writer(partial, TEXT_FEATURES) as writer:
        left, stream = rows.count, _Tokens(rows)
        while left:
            count = min(left, at_once)
            values = pa.array(stream.take(count * length))
            offsets = pa.array(np.arange(0, (count + 1) * length, length, dtype=np.int32))
            column = pa.ListArray.from_arrays(offsets, values).cast(writer.schema.field("input_ids").type)
            writer.write_batch(pa.RecordBatch.from_arrays([column], schema=writer.schema))
            left -= count


class _Tokens:
    """The sources as one stream, of which no more is held than was asked for."""

    def __init__(self, rows: Rows):
        self._pieces = self._read(rows)
        self._rest = np.empty(0, np.int32)

    @staticmethod
    def _read(rows: Rows) -> Iterator[np.ndarray]:
        for index, path in enumerate(rows.sources):
            with path.open("rb") as file:
                file.seek(0 if index else rows.skip * _BYTES_OF_A_TOKEN)
                while block := file.read(_TOKENS_AT_ONCE * _BYTES_OF_A_TOKEN):
                    yield np.frombuffer(block, np.int32)

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens."""
        have = [self._rest]
        while sum(map(len, have)) < count:
            have.append(next(self._pieces))
        joined = np.concatenate(have)
        self._rest = joined[count:]
        return joined[:count]
