"""Raw data, and what `make preprocess` is told."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from bad_inputs.case import Case, Place

_GOOD = '{"instruction": "Why?", "output": "So."}\n'


def _line(name: str, expected: str, line: str | bytes, **changes: str) -> Case:
    """A bad second line."""

    def command(place: Place) -> list[str]:
        bad = line.encode() if isinstance(line, str) else line
        return place.preprocess(place.file("a.jsonl", _GOOD.encode() + bad + b"\n" + _GOOD.encode()), **changes)

    return Case(name, f"DATA = 'GIVEN/a.jsonl:2': {expected}", command)


def _flag(name: str, expected: str, *flags: str, **changes: str) -> Case:
    return Case(name, expected, lambda place: place.preprocess(place.file("a.jsonl", _GOOD), *flags, **changes))


def _data(name: str, expected: str, make: Callable[[Place], Path | str]) -> Case:
    return Case(name, expected, lambda place: place.preprocess(make(place)))


def _of_another_tokenizer(place: Place) -> list[str]:
    out = place.copied()
    manifest = json.loads((out / "records.json").read_text())
    (out / "records.json").write_text(json.dumps(manifest | {"tokenizer": "0123"}))
    return place.preprocess(place.file("a.jsonl", _GOOD), out=str(out))


_DEEP = "[" * 100_000
TEXTS = [
    _line("half a record", "not valid JSON at column", '{"instruction": "a", "output":'),
    _line("a list", "a JSON object is needed, this is a list", '["instruction"]'),
    _line("a number", "a JSON object is needed, this is a int", "3"),
    _line("null", "a JSON object is needed, this is a NoneType", "null"),
    _line("too deep", "not valid JSON at column", _DEEP),
    _line("no field", "needs 'instruction', 'prompt' or 'messages'", '{"text": "a"}'),
    _line("an empty instruction", "'instruction' is empty", '{"instruction": " ", "output": "b"}'),
    _line("a number as an instruction", "'instruction' must be text, this is a int", '{"instruction": 3}'),
    _line("an object as an output", "'output' must be text or a list", '{"instruction": "a", "output": {}}'),
    _line("messages as a text", "'messages' must be a list of turns", '{"messages": "hello"}'),
    _line("a turn without a role", "each of 'messages' needs a 'role'", '{"messages": [{"content": "x"}]}'),
    _line("a turn that is a text", "each of 'messages' needs a 'role'", '{"messages": ["x"]}'),
    _line("a writer that is a list", "'written_by' must be text", '{"instruction": "a", "written_by": ["x"]}'),
    _line("a word for complete", "'complete' must be true or false", '{"instruction": "a", "complete": "no"}'),
    _line("bytes that are no text", "not UTF-8", b'{"instruction": "caf\xe9"}'),
    _line("NULs", "not valid JSON at column 1", "\0" * 64),
    _line("a NUL in a text", "not valid JSON at column", '{"instruction": "a\0b"}'),
    _line("half a surrogate pair", "holds half a surrogate pair", '{"instruction": "\\ud83d", "output": "b"}'),
    _line(
        "a conversation in alpaca",
        "a conversation of 2 turns needs TEMPLATE=chat",
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}),
        template="alpaca",
    ),
    _line("text without a text", "needs a 'text' field", '{"txt": "a"}', kind="text"),
    _data(
        "a byte-order mark",
        "'GIVEN/a.jsonl:1': begins with a byte-order mark",
        lambda p: p.file("a.jsonl", b"\xef\xbb\xbf" + _GOOD.encode()),
    ),
    _data("no such file", "DATA = '*.jsonl': no such file", lambda _: "*.jsonl"),
    _data("an empty file", "DATA = 'GIVEN/a.jsonl': the file is empty", lambda p: p.file("a.jsonl", "")),
    _data("blank lines", "DATA = 'GIVEN/a.jsonl': no record was kept", lambda p: p.file("a.jsonl", "\n\n \n")),
    _data("a folder", "DATA = 'GIVEN': is a folder; name the files in it, as in 'GIVEN/*.jsonl'", lambda p: p.given),
    _data(
        "gzip",
        "DATA = 'GIVEN/a.jsonl.gz': is gzip, no text; unpack it first",
        lambda p: p.file("a.jsonl.gz", gzip.compress(_GOOD.encode())),
    ),
    _data("zstd", "'GIVEN/a.jsonl': is zstd, no text", lambda p: p.file("a.jsonl", b"\x28\xb5\x2f\xfd" + b"x" * 9)),
    _data("Parquet", "is Parquet, no text; write it as jsonl", lambda p: p.file("a.parquet", b"PAR1" + b"\0" * 64)),
    _data("UTF-16", "is UTF-16, no text; convert it to UTF-8", lambda p: p.file("a.jsonl", _GOOD.encode("utf-16"))),
    _flag(
        "no room for a response", "MAX_PROMPT = 60: leaves no room in MAX_LENGTH = 60", max_prompt="60", max_length="60"
    ),
    _flag("a negative prompt", "MAX_PROMPT = -1: leaves no room", max_prompt="-1"),
    _flag("a length that is a word", "argument --max-length: invalid int value: 'long'", max_length="long"),
    _flag("no such template", "argument --template: invalid choice: 'chatml'", template="chatml"),
    _flag("no workers", "argument --workers: 0 is not 1 or more", "--workers", "0"),
    _flag("no tokenizer", "TOKENIZER = '/nowhere': no such folder", tokenizer="/nowhere"),
    _flag("an empty tokenizer", "TOKENIZER = ''", tokenizer=""),
    Case(
        "a sentencepiece model that is none",
        "TOKENIZER = 'GIVEN/a.model': no readable tokenizer there",
        lambda p: p.preprocess(p.file("a.jsonl", _GOOD), tokenizer=str(p.file("a.model", "x" * 99)), template="plain"),
    ),
    _flag("no name for the records", "OUT = '.': names no folder of its own", out=""),
    Case(
        "records of another tokenizer", "OUT = 'GIVEN/train': holds records of another tokenizer", _of_another_tokenizer
    ),
    Case(
        "records in place of other things",
        "OUT = 'GIVEN': exists and holds no records",
        lambda p: p.preprocess(p.file("a.jsonl", _GOOD), out=str(p.given)),
    ),
    Case(
        "records below a file",
        "OUT = 'GIVEN/a.jsonl/out': cannot be made",
        lambda p: p.preprocess(p.file("a.jsonl", _GOOD), out=str(p.given / "a.jsonl/out")),
    ),
]
