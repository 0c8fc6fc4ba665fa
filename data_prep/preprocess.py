"""Raw text → tokenised Arrow records. What `make preprocess` runs.

python -m data_prep.preprocess --data 'raw/*.jsonl' --out records/train --tokenizer DIR --template chat
"""

import argparse
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from data_prep.sources import find_files, read_lines
from data_prep.templates import TEMPLATES
from data_prep.tokenize import Line, Recipe, start_worker, tokenize_instructions, tokenize_text
from distill.data.folders import replace_folder
from distill.data.records import (
    INSTRUCTION_FEATURES,
    MANIFEST,
    TEXT_FEATURES,
    Kind,
    Manifest,
    RecordSettings,
    fingerprint,
    read_manifest,
)
from distill.errors import EXIT_BAD_INPUT, BadInput, Problem
from distill.models.loading import load_tokenizer

_LINES_A_TASK = 64
_PROBLEMS_SHOWN = 10
_BYTES_WORTH_A_WORKER = 4 * 2**20


def preprocess(
    data: list[str], out: Path, recipe: Recipe, kind: Kind = "instructions", workers: int | None = None
) -> Manifest:
    """Tokenise the files that `data` names into the folder `out`; rows keep the order of the input.

    The folder appears whole or not at all. A folder of the same tokenizer is replaced.

    Returns:
        What `records.json` says of them.

    Raises:
        BadInput: missing, empty or malformed input; `out` holds something else; nothing was kept.
    """
    files = find_files(data)
    tokenizer = load_tokenizer(recipe.tokenizer, "TOKENIZER")
    _check_tokenizer(tokenizer, recipe, kind)
    settings = RecordSettings(**vars(recipe), data=[str(path) for path in files])
    written_by = fingerprint(tokenizer)
    _check_replaceable(out, written_by)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counts = _write_rows(files, partial, recipe, kind, workers or _default_workers(files))
        manifest = Manifest(kind=kind, tokenizer=written_by, settings=settings, counts=counts)
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _default_workers(files: list[Path]) -> int:
    """One a core, but no more than there is work for: starting one takes as long as tokenising some megabytes."""
    size = sum(path.stat().st_size for path in files)
    return min(len(os.sched_getaffinity(0)), 1 + size // _BYTES_WORTH_A_WORKER)


def _write_rows(files: list[Path], folder: Path, recipe: Recipe, kind: str, workers: int) -> dict[str, int]:
    counts: Counter[str] = Counter()
    features = INSTRUCTION_FEATURES if kind == "instructions" else TEXT_FEATURES
    # Written once as one stream, then into place: datasets refuses to save a folder over its own source.
    stream = folder / "stream" / "rows.arrow"
    stream.parent.mkdir()
    with ArrowWriter(path=str(stream), features=features) as writer:
        for row in _rows(files, recipe, kind, workers, counts):
            writer.write(row)
        writer.finalize()
    if counts["kept"] == 0:
        mend = "raise MAX_PROMPT" if kind == "instructions" else "lower MAX_LENGTH or give more text"
        raise BadInput(Problem("DATA", str(files[0]), f"no record was kept ({dict(counts)})", mend))
    rows = datasets.Dataset.from_file(str(stream))
    datasets.disable_progress_bars()
    rows.save_to_disk(str(folder))
    shutil.rmtree(stream.parent)
    return {name: count for name, count in sorted(counts.items()) if count}


def _rows(files: list[Path], recipe: Recipe, kind: str, workers: int, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    with (
        tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True, desc="tokenise") as bar,
        _mapper(recipe, workers) as map_in_order,
    ):
        tasks = _tasks(files, bar)
        if kind == "instructions":
            for chunk in map_in_order(tokenize_instructions, tasks):
                counts.update(chunk.counts)
                yield from chunk.rows
        else:
            pieces = (ids for texts in map_in_order(tokenize_text, tasks) for ids in texts)
            yield from _pack(pieces, recipe.max_length, counts)


@contextmanager
def _mapper(recipe: Recipe, workers: int) -> Iterator[Any]:
    """A `map` over worker processes that keeps the order, so the output is the same for any number of them."""
    if workers == 1:
        start_worker(recipe)
        yield map
        return
    # spawn: a fork would copy this process's threads' locks.
    with multiprocessing.get_context("spawn").Pool(workers, start_worker, [recipe]) as pool:
        yield pool.imap


def _pack(pieces: Iterator[list[int]], length: int, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Cut the stream of all tokens into chunks of exactly `length`; the rest at the end is dropped."""
    pending: list[int] = []
    for ids in pieces:
        counts["tokens read"] += len(ids)
        pending += ids
        while len(pending) >= length:
            yield {"input_ids": pending[:length]}
            counts["kept"] += 1
            pending = pending[length:]
    counts["dropped: tokens of the last, incomplete chunk"] += len(pending)


def _tasks(files: list[Path], bar: Any) -> Iterator[list[Line]]:
    for path in files:
        lines = ((str(path), number, line) for number, line in read_lines(path))
        while task := list(islice(lines, _LINES_A_TASK)):
            bar.update(sum(len(line.encode()) for _, _, line in task))
            yield task


def _check_tokenizer(tokenizer: Any, recipe: Recipe, kind: Kind) -> None:
    if tokenizer.eos_token_id is None:
        raise BadInput(Problem("TOKENIZER", recipe.tokenizer, "has no EOS token", "set eos_token in its config"))
    if kind == "text":  # plain text has no prompts
        if recipe.max_length < 2:
            raise BadInput(Problem("MAX_LENGTH", recipe.max_length, "leaves no token to predict", "give 2 or more"))
        return
    if recipe.template == "chat" and not tokenizer.chat_template:
        raise BadInput(Problem("TEMPLATE", "chat", "this tokenizer has no chat template", "use alpaca or plain"))
    if not 0 < recipe.max_prompt < recipe.max_length:
        raise BadInput(
            Problem("MAX_PROMPT", recipe.max_prompt, f"leaves no room in MAX_LENGTH = {recipe.max_length}", "lower it")
        )


def _check_replaceable(out: Path, tokenizer: str) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise BadInput(Problem("OUT", str(out), "exists and holds no records", "name another folder"))
    if read_manifest(out, "OUT").tokenizer != tokenizer:
        raise BadInput(
            Problem("OUT", str(out), "holds records of another tokenizer", "remove it or name another folder")
        )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="jsonl or txt files, or globs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder or id, or a sentencepiece .model")
    parser.add_argument("--kind", choices=("instructions", "text"), default="instructions")
    parser.add_argument("--template", choices=TEMPLATES, default="alpaca")
    parser.add_argument("--max-prompt", type=int, default=256, help="tokens; longer prompts are dropped")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and response together")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    args = parser.parse_args()
    recipe = Recipe(args.tokenizer, args.template, args.max_prompt, args.max_length)
    try:
        manifest = preprocess(args.data, args.out, recipe, args.kind, args.workers)
    except BadInput as error:
        for problem in error.problems[:_PROBLEMS_SHOWN]:
            print(f"preprocess: {problem}", file=sys.stderr)
        if len(error.problems) > _PROBLEMS_SHOWN:
            print(f"preprocess: … and {len(error.problems) - _PROBLEMS_SHOWN} more lines", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in manifest.counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
