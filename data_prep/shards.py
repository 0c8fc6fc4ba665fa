"""Raw files as shards: slices of equal size whose lines are the same whoever reads them, and how many there are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from distill.data.jsonl import unreadable
from distill.errors import Problem

_SMALLEST, _LARGEST = 2**18, 2**27
_SHARDS_WANTED = 1024
_READ_AT_ONCE = 2**20
LONGEST_LINE = 2**26
"""Bytes. A longer line is a bad one: what a worker holds in memory is bounded by it."""


@dataclass(frozen=True)
class Span:
    """The lines of one file that begin in the bytes `begin` to `end` - 1."""

    path: str
    begin: int
    end: int
    newlines_before: int = 0
    """Newlines in the bytes 0 to `begin` - 2, from which the line numbers go on."""


@dataclass(frozen=True)
class Shard:
    """What one worker takes at once: pieces of one file or of several that follow each other."""

    number: int
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        """Size of the input."""
        return sum(span.end - span.begin for span in self.spans)


@dataclass(frozen=True)
class Line:
    """One line as it stands in its file."""

    path: str
    number: int
    raw: bytes | None
    """None: longer than `LONGEST_LINE`."""

    @property
    def where(self) -> str:
        """`file:line`, as problems name it."""
        return f"{self.path}:{self.number}"


def shard_size(total: int) -> int:
    """Bytes of a shard: a power of two by the size of the input, so that it does not depend on who works on it."""
    size = _SMALLEST
    while size < _LARGEST and size * _SHARDS_WANTED < total:
        size *= 2
    return size


def cut(files: list[Path], size: int) -> list[Shard]:
    """All bytes of the files, in order, in shards of `size`; the last one may be smaller."""
    shards: list[Shard] = []
    spans: list[Span] = []
    room = size
    for path in files:
        at, end_of_file = 0, path.stat().st_size
        while at < end_of_file:
            end = min(end_of_file, at + room)
            spans.append(Span(str(path), at, end))
            room -= end - at
            at = end
            if room == 0:
                shards.append(Shard(len(shards), tuple(spans)))
                spans, room = [], size
    return [*shards, Shard(len(shards), tuple(spans))] if spans else shards


def count_newlines(shard: Shard) -> list[int | Problem]:
    """Newlines in the bytes `begin` - 1 to `end` - 2 of each span, or why they cannot be read."""
    return [_count_newlines(span) for span in shard.spans]


def _count_newlines(span: Span) -> int | Problem:
    begin = max(span.begin - 1, 0)
    left, count = span.end - 1 - begin, 0
    try:
        with open(span.path, "rb") as file:
            file.seek(begin)
            while left > 0 and (block := file.read(min(left, _READ_AT_ONCE))):
                count += block.count(b"\n")
                left -= len(block)
    except OSError as error:
        return unreadable(span.path, error)
    return count


def cut_inside_a_file(shards: list[Shard]) -> list[Shard]:
    """The shards whose last file goes on in the next one: what follows needs their newlines."""
    return [shard for shard, following in pairwise(shards) if shard.spans[-1].path == following.spans[0].path]


def number_lines(shards: list[Shard], newlines: dict[int, list[int | Problem]]) -> list[Shard]:
    """The shards with `newlines_before`; a piece that could not be counted is left out, with its file's rest."""
    numbered, before, path = [], 0, ""
    lost: set[str] = set()
    for shard in shards:
        spans = []
        for index, span in enumerate(shard.spans):
            before = before if span.path == path else 0
            path = span.path
            found = newlines[shard.number][index] if shard.number in newlines else 0
            if isinstance(found, Problem):
                lost.add(path)
                continue
            if path not in lost:
                spans.append(replace(span, newlines_before=before))
            before += found
        numbered.append(replace(shard, spans=tuple(spans)))
    return numbered


def read_lines_of(shard: Shard) -> Iterator[Line | Problem]:
    """The shard's lines, blank ones too, in order; a problem where a file's bytes end too early."""
    for span in shard.spans:
        try:
            yield from _lines_of(span)
        except OSError as error:
            yield unreadable(span.path, error)


def _lines_of(span: Span) -> Iterator[Line]:
    with open(span.path, "rb") as file:
        at, number = span.begin, span.newlines_before
        if at > 0:  # the line that runs into this span belongs to the one before
            file.seek(at - 1)
            at = at - 1 + _skip_line(file, span.end - at + 1)
            number += 1
        while at < span.end and (raw := file.readline(LONGEST_LINE)):
            number += 1
            at += len(raw)
            if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                at += _skip_line(file, span.end - at)
                yield Line(span.path, number, None)
            else:
                yield Line(span.path, number, raw)


def _skip_line(file: BinaryIO, enough: int) -> int:
    """Bytes up to the line's end, or a few more than `enough` of a line that is longer."""
    skipped = 0
    while skipped < enough and (piece := file.readline(_READ_AT_ONCE)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
