"""Preprocessing against the tokenizer's own batch call on one core, and its memory for four times as much text.

As many processes as there are cores do the one, then the other. Without --data the text is random words by Zipf's law,
without --tokenizer a BPE is trained on some of it.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import get_args

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_prep.pool import processes
from data_prep.preprocess import run_preprocess
from data_prep.tokenize import Recipe
from distill.data.jsonl import read_lines
from distill.data.records import Kind
from distill.data.templates import parse, prompt_texts
from tools.benchmarks.timing import Times, ratio
from tools.memory import MemoryWatch

_WORDS, _VOCABULARY = 50_000, 8192
_TEXTS_A_CALL = 1000
_GROWN = 4
_SUFFIXES = {"instructions": "jsonl", "text": "txt"}


class Prose:
    """Sentences of made-up words, the n-th likeliest of which comes with a probability of about 1/n."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        consonants, vowels = "b c d f g h l m n p r s t v st tr ch", "a e i o u ea ou"
        syllables = [c + v for c in consonants.split() for v in vowels.split()]
        self._words = ["".join(self._random.choices(syllables, k=self._random.randint(1, 4))) for _ in range(_WORDS)]
        self._weights = list(accumulate(1 / (n + 3) for n in range(_WORDS)))

    def sentences(self, words: int) -> str:
        """About so many words, some of them numbers."""
        said = []
        while words > 0:
            length = self._random.randint(5, 20)
            sentence = self._random.choices(self._words, cum_weights=self._weights, k=length)
            if self._random.random() < 0.2:
                sentence[-1] = str(self._random.randint(1, 3000))
            said.append(" ".join(sentence).capitalize() + self._random.choice(".....?!"))
            words -= length
        return " ".join(said)

    def line(self, kind: Kind) -> str:
        """A paragraph, or an instruction with its answer."""
        if kind == "text":
            return self.sentences(self._random.randint(20, 150)) + "\n"
        instruction, output = self.sentences(self._random.randint(5, 40)), self.sentences(self._random.randint(20, 150))
        return json.dumps({"instruction": instruction, "output": output}) + "\n"


def write_corpus(path: Path, size: int, line: Callable[[], str]) -> None:
    """A file of at least `size` bytes."""
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < size:
            written += file.write(line())


def train_tokenizer(folder: Path, corpus: Path) -> None:
    """A byte-level BPE trained on the corpus, as a Hugging Face folder."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train([str(corpus)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(folder)


@dataclass(frozen=True)
class Share:
    """Every n-th of the texts that preprocessing tokenises, for one of n workers."""

    corpus: Path
    recipe: Recipe
    kind: Kind
    first: int
    workers: int


def seconds_in_batches(share: Share) -> float:
    """Time of the tokenizer's own batch call on a share of the texts, with neither reading nor writing."""
    tokenizer, texts = _texts_of(share)
    started = time.perf_counter()
    for begin in range(0, len(texts), _TEXTS_A_CALL):
        tokenizer(texts[begin : begin + _TEXTS_A_CALL])
    return time.perf_counter() - started


@lru_cache(1)
def _texts_of(share: Share) -> tuple[PreTrainedTokenizerBase, list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(share.recipe.tokenizer, trust_remote_code=False)
    lines = [line for _, line in read_lines(share.corpus)][share.first :: share.workers]
    if share.kind == "text":
        return tokenizer, [json.loads(line)["text"] for line in lines] if share.corpus.suffix == ".jsonl" else lines
    examples = [parse(json.loads(line), "") for line in lines]
    prompts = [text for text in prompt_texts(examples, share.recipe.template, tokenizer) if isinstance(text, str)]
    return tokenizer, prompts + [example.outputs[0] for example in examples if example.outputs]


def speeds(corpus: Path, recipe: Recipe, kind: Kind, workers: int, repeats: int) -> dict[str, float]:
    """Preprocessing and the batch call in turn, in the same processes; a first round of warm-up is not counted."""
    shares = [Share(corpus, recipe, kind, first, workers) for first in range(workers)]
    times: Times = {name: [] for name in ("preprocess", "tokenizer", "preprocess_cpu", "tokenizer_cpu")}
    with processes(workers) as pool:
        for _ in range(repeats + 1):
            before = _cpu_seconds()
            made = run_preprocess([str(corpus)], corpus.with_suffix(".records"), recipe, kind, pool=pool).throughput
            between = _cpu_seconds()
            times["tokenizer"].append(sum(pool.results(seconds_in_batches, shares)))
            times["preprocess"].append(made.seconds * workers)
            times["preprocess_cpu"].append(between - before)
            times["tokenizer_cpu"].append(_cpu_seconds() - between)
    times = {name: took[1:] for name, took in times.items()}
    # The less time, the more speed: the tokenizer's seconds of a core over ours are our speed over its.
    wall, cpu = ratio(times, "tokenizer", "preprocess"), ratio(times, "tokenizer_cpu", "preprocess_cpu")
    took = statistics.median(times["preprocess"])
    return {
        f"preprocess_over_tokenizer_{kind}": wall["tokenizer_over_preprocess"],
        f"preprocess_over_tokenizer_{kind}_spread": wall["tokenizer_over_preprocess_spread"],
        f"preprocess_over_tokenizer_{kind}_cpu": cpu["tokenizer_cpu_over_preprocess_cpu"],
        f"mb_per_s_per_core_{kind}": made.bytes / 1e6 / took,
        f"tokens_per_s_per_core_{kind}": made.tokens / took,
    }


def _cpu_seconds() -> float:
    """Of this process and its children: what they have worked, however busy the machine is with other things."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [me, *me.children(recursive=True)])


def peak_mib(corpus: list[Path], recipe: Recipe, kind: Kind, workers: int) -> float:
    """Peak memory of the command on these files, all its processes together."""
    command = [sys.executable, "-m", "data_prep.preprocess", "--data", *map(str, corpus)]
    command += ["--out", str(corpus[0].with_suffix(".records")), "--tokenizer", recipe.tokenizer, "--kind", kind]
    command += ["--template", recipe.template, "--workers", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with MemoryWatch(process.pid, 0.1) as memory:
        code = process.wait()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return memory.peak_gib * 1024


def memory(corpus: Path, recipe: Recipe, kind: Kind, workers: int) -> dict[str, float]:
    """Peak memory, and that of four times as much text over it."""
    copies = [corpus.with_name(f"{n}-{corpus.name}") for n in range(_GROWN)]
    for copy in copies:
        copy.symlink_to(corpus)
    once, grown = (peak_mib(files, recipe, kind, workers) for files in ([corpus], copies))
    return {f"peak_mib_{kind}": once, f"memory_growth_{kind}": grown / once}


def run(args: argparse.Namespace) -> dict[str, object]:
    """Speed and memory of each kind of records."""
    workers = args.workers or len(os.sched_getaffinity(0))
    kinds: tuple[Kind, ...] = (args.kind,) if args.kind else get_args(Kind)
    figures: dict[str, object] = {"workers": workers, "megabytes": args.megabytes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prose = Prose(args.seed)
        if not args.tokenizer:
            write_corpus(folder / "sample.txt", 2 * 10**6, partial(prose.line, "text"))
            train_tokenizer(folder / "tokenizer", folder / "sample.txt")
        recipe = Recipe(args.tokenizer or str(folder / "tokenizer"), args.template, max_prompt=256, max_length=512)
        for kind in kinds:
            corpus = folder / (args.data.name if args.data else f"{kind}.{_SUFFIXES[kind]}")
            if args.data:
                shutil.copyfile(args.data, corpus)
            else:
                write_corpus(corpus, int(args.megabytes * 1e6), partial(prose.line, kind))
            figures |= speeds(corpus, recipe, kind, workers, args.repeats)
            figures |= memory(corpus, recipe, kind, workers)
    return figures
