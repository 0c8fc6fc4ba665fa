"""Raw text → tokenised Arrow records. What `make preprocess` runs, with one process a core, or with MPI one a rank.

python -m data_prep.preprocess --data 'raw/*.jsonl' --out records/train --tokenizer DIR --template chat
mpirun -n 64 --hostfile hosts python -m data_prep.preprocess …
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
import tokenizers
import transformers

from data_prep.cores import usable_cores
from data_prep.files import write_text
from data_prep.lock import alone_in
from data_prep.pool import Pool, is_first_rank, processes, ranks, under_mpi
from data_prep.progress import Progress, hash_of
from data_prep.run import Run, Throughput
from data_prep.shards import shard_size
from data_prep.sources import find_files
from data_prep.tokenize import Job, Recipe
from distill.console import positive
from distill.data.encoder import content_hash
from distill.data.folders import replace_folder
from distill.data.jsonl import unreadable
from distill.data.records import MANIFEST, Kind, Manifest, RecordSettings, fingerprint, read_manifest
from distill.data.templates import TEMPLATES
from distill.errors import EXIT_BAD_INPUT, BadInput, Problem
from distill.models.loading import load_tokenizer

_BYTES_WORTH_A_WORKER = 4 * 2**20
_FORM = 1
"""Of the work folder; a change of it makes interrupted runs begin anew."""

OnBad = Literal["fail", "skip"]


@dataclass(frozen=True)
class Outcome:
    """What a run made, what it left out (the first such lines), and how fast it was."""

    manifest: Manifest
    skipped: list[Problem]
    throughput: Throughput


def preprocess(
    data: list[str], out: Path, recipe: Recipe, kind: Kind = "instructions", workers: int | None = None
) -> Manifest:
    """As `run_preprocess`, with bad lines refused."""
    return run_preprocess(data, out, recipe, kind, workers=workers).manifest


def run_preprocess(
    data: list[str],
    out: Path,
    recipe: Recipe,
    kind: Kind = "instructions",
    *,
    on_bad: OnBad = "fail",
    shard_bytes: int | None = None,
    workers: int | None = None,
    pool: Pool | None = None,
) -> Outcome:
    """Tokenise the files that `data` names into the folder `out`; rows keep the order of the input.

    The folder appears whole or not at all, and its bytes depend neither on the workers nor on interruptions. Until then
    finished shards of `shard_bytes` wait in `OUT.partial`, from which the same call goes on. A folder of the same
    tokenizer is replaced. `pool` does the work, or so many `workers`.

    Raises:
        BadInput: missing, empty or malformed input; `out` holds something else, or another run works on it; nothing
            was kept.
    """
    files = find_files(data)
    tokenizer = load_tokenizer(recipe.tokenizer, "TOKENIZER")
    _check_tokenizer(tokenizer, recipe, kind)
    written_by = fingerprint(tokenizer)
    _check_replaceable(out, written_by)
    job = Job(recipe, kind, content_hash(tokenizer))
    inputs = [_state_of(path) for path in files]
    total = sum(size for _, size, _ in inputs)
    size = shard_bytes or shard_size(total)
    partial = out.with_name(out.name + ".partial")
    with ExitStack() as held:
        locked = held.enter_context(alone_in(partial, out))
        workforce = pool or held.enter_context(processes(workers or _default_workers(total)))
        progress = Progress(partial, _key(job, inputs, size), alone=locked)
        run = Run(job, progress, workforce, skip=on_bad == "skip")
        try:
            run.plan(files, size)
            run.tokenize()
        except BadInput:
            if progress.begun and not run.worth_keeping():
                progress.remove()
            raise
        counts = run.counts()
        if found := _changed(inputs, skip=on_bad == "skip") or _nothing_kept(counts, files, kind):
            progress.remove()
            raise BadInput([*run.problems(), found])
        records = run.assemble()
        settings = RecordSettings(**vars(recipe), data=[str(path) for path in files])
        manifest = Manifest(kind=kind, tokenizer=written_by, settings=settings, counts=counts)
        write_text(records / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        replace_folder(records, out)
        progress.remove()
    return Outcome(manifest, run.problems(), run.throughput)


def _default_workers(size: int) -> int:
    """One a core, but no more than there is work for: starting one takes as long as tokenising some megabytes."""
    return min(usable_cores(), 1 + size // _BYTES_WORTH_A_WORKER)


def _state_of(path: Path) -> tuple[str, int, int]:
    """What tells whether a file was changed: its name, size and time.

    Raises:
        BadInput: it is gone, or out of reach.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise BadInput(unreadable(str(path), error)) from None
    return str(path), state.st_size, state.st_mtime_ns


def _key(job: Job, inputs: list[tuple[str, int, int]], size: int) -> str:
    """A hash of all that decides the bytes of a shard."""
    versions = [library.__version__ for library in (datasets, pyarrow, tokenizers, transformers)]
    return hash_of([_FORM, vars(job.recipe), job.kind, job.tokenizer_hash, inputs, size, versions])


def _changed(inputs: list[tuple[str, int, int]], skip: bool) -> Problem | None:
    """A file that is not the one that was to be read; what `skip` could not read of one that is gone was left out."""
    for before in inputs:
        try:
            now = _state_of(Path(before[0]))
        except BadInput:
            if skip:
                continue
            raise
        if now != before:
            return Problem("DATA", before[0], "was changed while it was read", "run again when it is complete")
    return None


def _nothing_kept(counts: dict[str, int], files: list[Path], kind: Kind) -> Problem | None:
    if "kept" in counts:
        return None
    mend = "raise MAX_PROMPT" if kind == "instructions" else "lower MAX_LENGTH or give more text"
    return Problem("DATA", str(files[0]), f"no record was kept ({counts})", mend)


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
    if out.name in ("", ".."):
        raise BadInput(Problem("OUT", str(out), "names no folder of its own", "name one, as in records/train"))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise BadInput(Problem("OUT", str(out), "exists and holds no records", "name another folder"))
    if read_manifest(out, "OUT").tokenizer != tokenizer:
        raise BadInput(
            Problem("OUT", str(out), "holds records of another tokenizer", "remove it or name another folder")
        )


def main() -> int:
    """Command line; under MPI rank 0 leads, and the others work for it."""
    args = _parser().parse_args()
    try:
        if not under_mpi():
            return _report(args, None)
        if args.workers:
            if not is_first_rank():
                return 0  # a failure here could end the launch before the first rank has said why
            raise BadInput(Problem("--workers", args.workers, "the ranks of MPI are the workers", "leave it out"))
        with ranks() as pool:
            return _report(args, pool) if pool else 0
    except BadInput as error:
        for problem in error.problems:
            print(f"preprocess: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("preprocess: interrupted; the same command continues", file=sys.stderr)
        return 130


def _report(args: argparse.Namespace, pool: Pool | None) -> int:
    recipe = Recipe(args.tokenizer, args.template, args.max_prompt, args.max_length)
    outcome = run_preprocess(
        args.data,
        args.out,
        recipe,
        args.kind,
        on_bad=args.on_bad,
        shard_bytes=args.shard_bytes,
        workers=args.workers,
        pool=pool,
    )
    for problem in outcome.skipped:
        print(f"preprocess: skipped: {problem}", file=sys.stderr)
    print(outcome.throughput)
    print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in outcome.manifest.counts.items()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="jsonl or txt files, or globs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder or id, or a sentencepiece .model")
    parser.add_argument("--kind", choices=("instructions", "text"), default="instructions")
    parser.add_argument("--template", choices=TEMPLATES, default="alpaca")
    parser.add_argument("--max-prompt", type=int, default=256, help="tokens; longer prompts are dropped")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and response together")
    parser.add_argument("--on-bad", choices=("fail", "skip"), default="fail", help="what to do about bad lines")
    parser.add_argument("--workers", type=positive, help="processes; default: one a core that it may use")
    parser.add_argument("--shard-bytes", type=positive, help="input of one output file; default: by the input's size")
    return parser


if __name__ == "__main__":
    sys.exit(main())
