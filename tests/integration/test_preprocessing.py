"""Preprocessing with real processes and MPI ranks: the same bytes from any of them, and after a kill."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import psutil
import pytest
from plain_records import ODD, at_the_limits, plain_records, plain_rows
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.pool import processes
from data_prep.preprocess import run_preprocess
from data_prep.tokenize import Recipe
from distill.data.records import Kind
from distill.errors import BadInput

needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
SHARD = 20_000


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, corpus: list[str], tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two jsonl files of instructions with a `text` field, and one of plain lines; 45 shards in all."""
    folder = tmp_path_factory.mktemp("raw")
    rows = [{"instruction": text, "output": f"{n} {text}", "text": f"{text} {n}"} for n in range(3) for text in corpus]
    for number, odd in enumerate([*ODD, *at_the_limits(tokenizer)]):
        rows.insert(150 * number + 7, odd | {"text": f"Odd: {number}."})
    lines = [json.dumps(row) for row in rows]
    (folder / "a.jsonl").write_text("\n\n".join(lines[:1000]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(lines[1000:]))
    (folder / "c.txt").write_text("\n\n".join(corpus * 2))
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that puts BOS before each text and EOS behind it, as some do; BOS is `<|user|>` here."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ends = [("<|user|>", 1), ("<eos>", 0)]
    backend.post_processor = TemplateProcessing(single="<|user|> $A <eos>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<|user|>")
    fast.chat_template = tokenizer.chat_template
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def inputs(raw: Path, kind: Kind) -> list[str]:
    return [str(raw / "*.jsonl"), *([str(raw / "c.txt")] if kind == "text" else [])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, raw: Path, tokenizer_dir: Path) -> dict[Kind, Path]:
    """The records of each kind as one process writes them."""
    folder = tmp_path_factory.mktemp("alone")
    kinds: tuple[Kind, ...] = ("instructions", "text")
    for kind in kinds:
        run_preprocess(inputs(raw, kind), folder / kind, recipe_of(tokenizer_dir), kind, shard_bytes=SHARD, workers=1)
    return {kind: folder / kind for kind in kinds}


def recipe_of(tokenizer_dir: Path, template: str = "alpaca") -> Recipe:
    return Recipe(str(tokenizer_dir), template, max_prompt=200, max_length=300)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def command(raw: Path, tokenizer_dir: Path, out: Path, kind: Kind, *more: str) -> list[str]:
    line = [sys.executable, "-m", "data_prep.preprocess", "--data", *inputs(raw, kind), "--out", str(out)]
    line += ["--tokenizer", str(tokenizer_dir), "--kind", kind, "--template", "alpaca"]
    return [*line, "--max-prompt", "200", "--max-length", "300", "--shard-bytes", str(SHARD), *more]


def mpirun(ranks: int, line: list[str], root: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    allowed["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    return subprocess.run(
        ["mpirun", "-n", str(ranks), *line],
        cwd=root,
        env=environment | allowed,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "template", "workers", "shard"),
    [
        ("instructions", "alpaca", 1, SHARD),
        ("instructions", "chat", 3, SHARD),
        ("text", "alpaca", 1, 10**7),
        ("text", "alpaca", 2, SHARD),
    ],
)
def test_records_are_those_of_a_plain_loop(
    kind: Kind, template: str, workers: int, shard: int, raw: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Record by record and in order, whoever writes them and in whichever shards."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    expected, counts = plain_records(raw, tokenizer, template) if kind == "instructions" else plain_rows(raw, tokenizer)
    if kind == "instructions" and template == "alpaca":
        assert max(len(record["prompt_ids"]) for record in expected) == 200
        fills = [record for record in expected if record["response_ids"][-1:] == [0]]
        assert max(len(record["prompt_ids"] + record["response_ids"]) for record in fills) == 300
    recipe, out = recipe_of(tokenizer_dir, template), tmp_path / "out"
    made = run_preprocess(inputs(raw, kind), out, recipe, kind, shard_bytes=shard, workers=workers)
    assert len(list(out.glob("*.arrow"))) > 20 or shard > SHARD
    assert datasets.load_from_disk(str(out)).to_list() == expected
    assert made.manifest.counts == counts
    assert min(counts.values()) > 0, "each kind of record is there"


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run() -> None:
    with processes(2) as pool, pytest.raises(BadInput, match="one of them was killed"):
        list(pool.results(os._exit, [1]))


@pytest.mark.slow
@needs_mpirun
def test_mpi_ranks_write_the_same_bytes_and_end_with_one_message_about_bad_lines(
    raw: Path, alone: dict[Kind, Path], tokenizer_dir: Path, tmp_path: Path, root: Path, environment: dict[str, str]
) -> None:
    """Two runs in one launch: its ranks take seconds to start."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jsonl").write_text('{"instruction": "Go."}\n' * 2000 + "{\n")
    runs = [
        command(raw, tokenizer_dir, tmp_path / "out", "text"),
        command(bad, tokenizer_dir, bad / "out", "instructions"),
    ]
    done = mpirun(2, in_turn(runs), root, environment)
    assert done.returncode == 2, done.stderr
    assert "with 2 workers" in done.stdout
    assert "MB/s" in done.stdout
    assert "tokens/s" in done.stdout
    assert hashes(tmp_path / "out") == hashes(alone["text"])
    assert done.stderr.count("a.jsonl:2001': not valid JSON") == 1
    assert "Traceback" not in done.stderr
    assert not (bad / "out").exists()


def in_turn(commands: list[list[str]]) -> list[str]:
    """One process that does what each of the commands would do."""
    script = """
import sys
from data_prep.preprocess import main
for sys.argv in eval(sys.argv[1]):
    code = main()
sys.exit(code)
"""
    return [sys.executable, "-c", script, repr([line[2:] for line in commands])]


STOPS_AT_THREE = """
import sys
from data_prep.preprocess import main
from data_prep.progress import Progress

finish = Progress.finish

def and_wait(self, summary):
    finish(self, summary)
    if len(self.finished) == 3:
        print("three are finished", flush=True)
        sys.stdin.read()

Progress.finish = and_wait
main()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(
    raw: Path,
    alone: dict[Kind, Path],
    tokenizer_dir: Path,
    tmp_path: Path,
    root: Path,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = command(raw, tokenizer_dir, tmp_path / "out", "instructions", "--workers", "2")
    line[1:3] = ["-c", STOPS_AT_THREE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(line, cwd=root, env=environment, **pipes) as running:
        assert running.stdout.readline() == b"three are finished\n"
        family = psutil.Process(running.pid).children(recursive=True)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert family
    assert not psutil.wait_procs(family, timeout=10)[1], "workers end with the process that started them"
    rows = tmp_path.glob("out.partial/*/records/*.arrow")
    written = {path.name: path.stat().st_mtime_ns for path in rows}
    assert len(list(tmp_path.glob("out.partial/*/shards/*.json"))) == 3
    assert len(list(alone["instructions"].glob("*.arrow"))) > len(written) >= 3
    assert not (tmp_path / "out").exists()
    recipe, given = recipe_of(tokenizer_dir), inputs(raw, "instructions")
    run_preprocess(given, tmp_path / "out", recipe, shard_bytes=SHARD, workers=1)
    assert "continues: 3 of" in capsys.readouterr().out
    assert hashes(tmp_path / "out") == hashes(alone["instructions"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    kept = [name for name, at in written.items() if (tmp_path / "out" / name).stat().st_mtime_ns == at]
    assert len(kept) >= 3, "finished shards are not written again"
