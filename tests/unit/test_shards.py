"""The parts of preprocessing at scale: cutting files, encoding in batches, packing, and what is kept of a run."""

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from data_prep import shards, tokenize
from data_prep.cores import usable_cores
from data_prep.lock import alone_in
from data_prep.packing import pack_shard, plan_rows
from data_prep.pool import Pool, _Crew, processes, ranks, under_mpi
from data_prep.preprocess import Outcome, main, run_preprocess
from data_prep.shards import Line, count_newlines, cut, cut_inside_a_file, number_lines, read_lines_of, shard_size
from data_prep.tokenize import Job, Recipe, tokenize_shard
from distill.data.encoder import Encoder, content_hash
from distill.data.jsonl import unreadable
from distill.data.templates import Malformed, parse, render, render_all
from distill.errors import BadInput

same_folder = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.lists(st.sampled_from(["", "a", "bc", "\n", "\n\n", "a\nb", "é\n", "long " * 5, "\r\n"])).map("".join)


@same_folder
@given(st.lists(texts.filter(bool), min_size=1, max_size=3), st.integers(1, 40))
def test_shards_of_any_size_hold_every_line_once_with_its_number(
    tmp_path: Path, contents: list[str], size: int
) -> None:
    files = [tmp_path / str(index) for index in range(len(contents))]
    for path, text in zip(files, contents, strict=True):
        path.write_bytes(text.encode())
    found = cut(files, size)
    assert [shard.number for shard in found] == list(range(len(found)))
    assert {shard.bytes for shard in found[:-1]} <= {size}
    newlines = {shard.number: count_newlines(shard) for shard in cut_inside_a_file(found)}
    lines = [line for shard in number_lines(found, newlines) for line in read_lines_of(shard)]
    expected = [Line(str(path), n, raw) for path in files for n, raw in enumerate(path.open("rb"), 1)]
    assert lines == expected


def test_the_size_of_a_shard_goes_by_the_input_alone() -> None:
    assert [shard_size(total) for total in (1, 2**28, 2**28 + 1, 2**36, 2**44)] == [2**18, 2**18, 2**19, 2**26, 2**27]


def test_a_line_too_long_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LONGEST_LINE", 8)
    monkeypatch.setattr(shards, "_READ_AT_ONCE", 3)
    path = tmp_path / "a.txt"
    path.write_text("short\n" + "x" * 50 + "\nseven77\nlast")
    for size in (10, 1000):
        found = cut([path], size)
        newlines = {shard.number: count_newlines(shard) for shard in cut_inside_a_file(found)}
        lines = [line for shard in number_lines(found, newlines) for line in read_lines_of(shard)]
        assert [(line.number, line.raw) for line in lines if isinstance(line, Line)] == [
            (1, b"short\n"),
            (2, None),
            (3, b"seven77\n"),
            (4, b"last"),
        ]


@same_folder
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(2, 12), st.integers(1, 40))
def test_rows_are_the_whole_stream_cut_at_equal_lengths(
    tmp_path: Path, tokens: list[int], length: int, at_once: int
) -> None:
    stream = np.arange(sum(tokens), dtype=np.int32)
    files = [tmp_path / f"{n}.tokens" for n in range(len(tokens))]
    for path, part in zip(files, np.split(stream, np.cumsum(tokens)[:-1]), strict=True):
        path.write_bytes(part.tobytes())
    found: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.packing._TOKENS_AT_ONCE", at_once)
        for number, rows in enumerate(plan_rows(files, tokens, length)):
            pack_shard(rows, length, tmp_path / f"{number}.arrow")
            found += datasets.Dataset.from_file(str(tmp_path / f"{number}.arrow"), in_memory=True)["input_ids"][:]
    whole = len(stream) // length
    assert found == stream[: whole * length].reshape(whole, length).tolist()


def example(text: str, turns: int = 1) -> Any:
    return parse({"messages": [{"role": "user", "content": text}] * turns, "output": "x"}, "1")


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
@pytest.mark.parametrize("ends", [False, True])
def test_batches_give_the_ids_of_one_text_at_a_time(
    tokenizer: PreTrainedTokenizerFast, template: str, ends: bool, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    if ends:  # a tokenizer that frames every text, and whose file asks for truncation and padding
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|user|> $A <eos>", special_tokens=[("<eos>", 0), ("<|user|>", 1)]
        )
        own.backend_tokenizer.enable_truncation(8)
        own.backend_tokenizer.enable_padding(length=30)
    said = ["Why?", "A longer question, with naïve 日本.\n\n", "<eos> within", "word " * 40]
    examples = [example(text) for text in said]
    found = render_all([examples[0], example("x", turns=3), *examples[1:]], template, Encoder(own))
    refused = found.pop(1)
    assert isinstance(refused, Malformed)
    assert ("turns must alternate" if template == "chat" else "needs TEMPLATE=chat") in str(refused)
    for ids, one in zip(found, examples, strict=True):
        if template == "chat":
            expected = own.apply_chat_template(one.messages, add_generation_prompt=True, return_dict=False)
        else:
            text = one.messages[0]["content"]
            expected = own.encode(text + "\n\n") if template == "plain" else render(one, template, own)
            expected = expected[:-1] if expected[-1] == 0 else expected
        assert ids == expected


def test_a_tokenizer_that_python_changes_is_asked_through_python(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Encoder(tokenizer)._rust is not None
    honest = PreTrainedTokenizerFast._encode_plus

    def shouting(self: PreTrainedTokenizerFast, text: Any, **named: Any) -> Any:
        louder = [one.upper() for one in text] if isinstance(text, list) else text.upper()
        return honest(self, louder, **named)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", shouting)
    encode = Encoder(tokenizer)
    assert encode._rust is None
    assert [tokenizer.decode(ids) for ids in encode(["quiet", "words"])] == ["QUIET", "WORDS"]
    assert encode([]) == []


@pytest.fixture
def recipe(models_dir: Path) -> Recipe:
    return Recipe(str(models_dir / "student"), "chat", max_prompt=40, max_length=200)


def test_another_tokenizer_on_a_host_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match="is another tokenizer on"):
        tokenize_shard(Job(recipe, "text", "of another"), cut([tmp_path / "a.jsonl"], 10)[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_chat_template_counts_as_part_of_a_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    first, second = (PreTrainedTokenizerFast.from_pretrained(tmp_path) for _ in range(2))
    assert content_hash(first) == content_hash(second)
    second.chat_template = "{{ messages }}"
    assert content_hash(first) != content_hash(second)


def lines(count: int) -> list[str]:
    return [json.dumps({"instruction": f"Say {n}.", "output": f"{n} " * 20}) for n in range(count)]


class Runs:
    """Runs over one file in small shards, and how many shards each of them tokenised."""

    def __init__(self, folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
        self.data = folder / "a.jsonl"
        self.out = folder / "out"
        self.partial = folder / "out.partial"
        self.recipe = recipe
        self.tokenized: list[int] = []
        self.stop_at: int | None = None
        self.before: Callable[[int], None] = lambda number: None
        monkeypatch.setattr("data_prep.run.tokenize_shard", self._tokenize)

    def _tokenize(self, job: Job, shard: shards.Shard, out: Path) -> tokenize.Summary:
        if shard.number == self.stop_at:
            raise KeyboardInterrupt
        self.before(shard.number)
        self.tokenized.append(shard.number)
        return tokenize_shard(job, shard, out)

    def __call__(self, **changes: Any) -> Outcome:
        self.tokenized.clear()
        given = {"recipe": self.recipe, "shard_bytes": 2000, "workers": 1} | changes
        return run_preprocess([str(self.data)], self.out, **given)

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.iterdir()}


@pytest.fixture
def runs(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, recipe, monkeypatch)


@pytest.mark.parametrize("kind", ["instructions", "text"])
def test_an_interrupted_run_goes_on_where_it_was(runs: Runs, kind: Any) -> None:
    runs.data.write_text("\n".join(lines(100) if kind == "instructions" else [json.dumps({"text": "w " * 30})] * 150))
    runs(kind=kind)
    whole, numbers = runs.content(), list(runs.tokenized)
    assert len(numbers) > 4
    runs.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        runs(kind=kind)
    assert runs.content() == whole, "the finished folder stays until another is complete"
    runs.stop_at = None
    (work,) = (path for path in runs.partial.iterdir() if path.is_dir())
    (work / "records" / "data-00003-of-00009.arrow.host.1.new").touch()  # as a killed worker leaves it
    rows = sorted(work.glob("records/*.arrow" if kind == "instructions" else "shards/*.tokens"))
    os.truncate(rows[1], 100)  # as a crash of the machine may leave it
    outcome = runs(kind=kind)
    assert runs.tokenized == [1, *numbers[3:]]
    assert runs.content() == whole
    assert not runs.partial.exists()
    assert outcome.throughput.bytes == runs.data.stat().st_size - 2 * 2000


@pytest.mark.parametrize("change", ["recipe", "kind", "input", "shards"])
def test_another_recipe_or_input_begins_anew(runs: Runs, change: str) -> None:
    runs.data.write_text("\n".join(f'{line[:-1]}, "text": "w w"}}' for line in lines(100)))
    runs.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        runs()
    runs.stop_at = None
    changes: dict[str, Any] = {
        "recipe": {"recipe": Recipe(runs.recipe.tokenizer, "chat", 40, 199)},
        "kind": {"kind": "text"},
        "input": {},
        "shards": {"shard_bytes": 4000},
    }
    if change == "input":
        runs.data.write_text(runs.data.read_text())  # the same bytes at another time
    runs(**changes[change])
    assert runs.tokenized[0] == 0


def test_a_second_run_at_the_same_folder_is_refused(runs: Runs) -> None:
    """Whatever its recipe: both would end as one folder."""
    runs.data.write_text("\n".join(lines(60)))
    others = [{}, {"kind": "text"}, {"recipe": Recipe(runs.recipe.tokenizer, "plain", 40, 199)}]

    def meanwhile(number: int) -> None:
        while others:
            with pytest.raises(BadInput, match=rf"another run is at work on it \(process {os.getpid()} on"):
                run_preprocess([str(runs.data)], runs.out, **{"recipe": runs.recipe, "workers": 1} | others.pop())

    runs.before = meanwhile
    assert runs().manifest.counts == {"kept": 60, "read": 60}
    assert not others
    assert not runs.partial.exists()


def test_a_lock_that_was_removed_does_not_count(tmp_path: Path) -> None:
    with alone_in(tmp_path / "x.partial", tmp_path / "x") as first:
        (tmp_path / "x.partial" / "lock").unlink()
        with alone_in(tmp_path / "x.partial", tmp_path / "x") as second:
            assert first
            assert second
    assert not list(tmp_path.iterdir())


def test_without_locks_runs_keep_to_their_own_folders(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    runs.data.write_text("\n".join(lines(60)))
    runs()
    whole = runs.content()

    def meanwhile(number: int) -> None:
        if number == 2:
            runs.before = lambda number: None
            runs(recipe=Recipe(runs.recipe.tokenizer, "plain", 40, 199))

    runs.before = meanwhile
    runs()
    assert runs.content() == whole
    assert "cannot be locked (No locks available): start no second run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["instructions", "text"])
def test_rows_that_another_hand_changed_are_not_put_together(runs: Runs, kind: Any) -> None:
    runs.data.write_text("\n".join([json.dumps({"instruction": "x", "text": "w " * 30})] * 150))
    files = "*/records/data-00000-*.arrow" if kind == "instructions" else "*/shards/00000.tokens"

    def meanwhile(number: int) -> None:
        if number == 2:
            (rows,) = runs.partial.glob(files)
            os.truncate(rows, 8)

    runs.before = meanwhile
    with pytest.raises(BadInput, match="is gone or not the one that this run wrote"):
        runs(kind=kind)
    assert not runs.out.exists()


def test_bad_lines_fail_or_are_skipped_and_finished_shards_serve_both(runs: Runs) -> None:
    good = lines(100)
    bad = {33: '{"instruction": "half', 34: '{"instruction": "\\ud83d", "output": "x"}', 80: "[" * 100000}
    runs.data.write_text("\n".join(bad.get(n, line) for n, line in enumerate(good, 1)))
    with pytest.raises(BadInput) as caught:
        runs()
    first, second, what_to_do = caught.value.problems
    assert (first.value, second.value) == (f"{runs.data}:33", f"{runs.data}:34")
    assert "half a surrogate pair" in second.wrong
    assert what_to_do.wrong.endswith("shards read so far: 2")
    assert "goes on from the shards that are finished" in what_to_do.mend
    finished = set(runs.tokenized)
    with pytest.raises(BadInput, match=":33"):
        runs()
    assert not runs.tokenized, "the same command fails at once"
    outcome = runs(on_bad="skip")
    assert not finished & set(runs.tokenized)
    assert [problem.value for problem in outcome.skipped] == [f"{runs.data}:{n}" for n in bad]
    assert outcome.manifest.counts == {"kept": 97, "read": 97, "skipped: bad lines": 3}
    rows = datasets.load_from_disk(str(runs.out))
    assert [row["id"].rsplit(":")[-1] for row in rows] == [str(n) for n in range(1, 101) if n not in bad]
    skipping = runs.content()
    runs(on_bad="skip")
    assert runs.content() == skipping


def test_of_many_bad_lines_the_first_are_named_and_all_counted(runs: Runs) -> None:
    runs.data.write_text("\n".join(["{"] * 300 + lines(10)))
    with pytest.raises(BadInput, match="in the 1 of 1 shards read so far: 300") as caught:
        runs(shard_bytes=10**6)
    assert len(caught.value.problems) == 11
    assert not runs.partial.exists()
    assert runs(on_bad="skip").manifest.counts == {"kept": 10, "read": 10, "skipped: bad lines": 300}


def test_finished_shards_outlive_a_killed_worker_and_a_file_out_of_reach(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if every shard has bad lines, which a run with ON_BAD=skip takes for finished."""
    runs.data.write_text("\n".join(line + "\n{" for line in lines(100)))
    honest = runs._tokenize

    def short_of_memory(job: Job, shard: shards.Shard, out: Path) -> tokenize.Summary:
        if shard.number == 3:
            raise BrokenProcessPool
        return honest(job, shard, out)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as executor:
        patch.setattr("data_prep.run.tokenize_shard", short_of_memory)
        with pytest.raises(BadInput, match="run the same command again, which continues"):
            runs(on_bad="skip", pool=Pool([_Crew(executor, 1)], 1))
    with pytest.raises(BadInput, match="not valid JSON"):
        runs(on_bad="fail")
    assert not runs.tokenized
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.run.count_newlines", lambda shard: [unreadable("a", OSError(5, "gone"))])
        with pytest.raises(BadInput, match="cannot be read"):
            runs(on_bad="fail", shard_bytes=4000)
    assert runs(on_bad="skip").manifest.counts["kept"] == 100
    assert runs.tokenized[0] == 3


@pytest.mark.parametrize("counted", [True, False])
def test_what_cannot_be_read_is_skipped_for_this_time(
    runs: Runs, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.data.write_text("\n".join(lines(60)))
    other = runs.data.with_name("b.jsonl")
    other.write_text("\n".join(lines(60)))

    def failing(path: str, mode: str) -> Any:
        if str(path) == str(other):
            raise OSError(5, "Input/output error")
        return open(path, mode)

    def both(**changes: Any) -> Outcome:
        runs.tokenized.clear()
        size = 2000 if counted else runs.data.stat().st_size
        files = [str(runs.data), str(other)]
        return run_preprocess(files, runs.out, runs.recipe, shard_bytes=size, workers=1, **changes)

    whole = {"kept": 120, "read": 120}
    for on_bad in ("fail", "skip"):
        with monkeypatch.context() as patch:
            patch.setattr(shards, "open", failing, raising=False)
            if on_bad == "fail":
                with pytest.raises(BadInput, match=r"b\.jsonl.*cannot be read \(Input/output error\)"):
                    both()
            else:
                found = both(on_bad="skip")
                assert found.manifest.counts["kept"] < 120
                assert found.manifest.counts["skipped: unreadable pieces of files"] > 0
                assert found.skipped[0].value == str(other)
        assert both().manifest.counts == whole
        assert counted or on_bad == "skip" or runs.tokenized == [1], "only what could not be read is read again"


def test_a_skip_run_goes_on_beside_a_file_it_cannot_read(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that file's lines are counted again, and once it can be read, only its shards are read again."""
    first, lost, last = (runs.data.with_name(f"{name}.jsonl") for name in "abc")
    for path in (first, lost, last):
        path.write_text("\n".join(lines(60)))
    runs.data = runs.data.with_name("[abc].jsonl")
    counted: list[str] = []
    reachable = False

    def opened(path: str, mode: str) -> Any:
        if str(path) == str(lost) and not reachable:
            raise OSError(5, "Input/output error")
        return open(path, mode)

    def count(shard: shards.Shard) -> Any:
        counted.extend(span.path for span in shard.spans)
        return count_newlines(shard)

    monkeypatch.setattr(shards, "open", opened, raising=False)
    monkeypatch.setattr("data_prep.run.count_newlines", count)
    for resumed in (False, True):
        counted.clear()
        runs.stop_at = 7 if resumed else 2
        with pytest.raises(KeyboardInterrupt):
            runs(on_bad="skip")
        assert runs.tokenized == ([2, 3, 4, 5, 6] if resumed else [0, 1])
        assert counted.count(str(first)) == (1 if resumed else 3), "one of its pieces shares a shard with the lost file"
    with pytest.raises(BadInput, match="cannot be read"):
        runs()
    reachable, runs.stop_at = True, None
    assert runs().manifest.counts == {"kept": 180, "read": 180}
    assert {0, 1, 6}.isdisjoint(runs.tokenized)
    assert 4 in runs.tokenized
    rows = datasets.load_from_disk(str(runs.out))
    assert [row["id"] for row in rows] == [f"{path}:{n}" for path in (first, lost, last) for n in range(1, 61)]


def test_a_file_that_goes_while_it_is_read_is_skipped_or_named(runs: Runs) -> None:
    runs.data.write_text("\n".join(lines(60)))
    other = runs.data.with_name("Z.jsonl")
    runs.data = runs.data.with_name("[Za].jsonl")
    refused = r"Z\.jsonl.*cannot be read \(No such file"
    for on_bad, gone_at, kept in (("skip", 0, 60), ("skip", 4, 62), ("fail", 0, 0), ("fail", 4, 0)):
        other.write_text("\n".join(lines(2)))
        runs.before = lambda number, gone_at=gone_at: other.unlink(missing_ok=True) if number == gone_at else None
        if on_bad == "skip":
            assert runs(on_bad="skip", shard_bytes=1200).manifest.counts["kept"] == kept
        else:
            with pytest.raises(BadInput, match=refused):
                runs(shard_bytes=1200)


def test_input_that_changes_meanwhile_is_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.data.write_text("\n".join(lines(60)))
    honest = runs._tokenize

    def appending(*arguments: Any) -> tokenize.Summary:
        with runs.data.open("a") as file:
            file.write("\n")
        return honest(*arguments)

    monkeypatch.setattr("data_prep.run.tokenize_shard", appending)
    with pytest.raises(BadInput, match="was changed while it was read"):
        runs()
    assert not runs.partial.exists()
    assert not runs.out.exists()


def test_tasks_are_taken_no_faster_than_there_are_workers() -> None:
    taken: list[int] = []

    def tasks() -> Any:
        for n in range(5):
            taken.append(n)
            yield n

    with processes(1) as pool:
        for n in pool.results(lambda task: task * 10, tasks()):
            assert n == taken[-1] * 10


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "350000 100000"}, 3),
        ("0::/job/step", {"cpu.max": "600000 100000", "job/cpu.max": "20000 100000", "job/step/cpu.max": "max 1"}, 1),
        ("0::/\n3:cpu,cpuacct:/docker/x", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("3:cpu,cpuacct:/j", {"cpu,cpuacct/j/cpu.cfs_quota_us": "-1", "cpu,cpuacct/j/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpuset:/j", {"cpuset/j/cpu.max": "100000 100000"}, 8),
    ],
)
def test_a_container_may_have_fewer_cores_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], cores: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(own)
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores(tmp_path) == cores


def test_one_process_of_a_launch_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not under_mpi()
    monkeypatch.setenv("PMI_SIZE", "1")
    assert not under_mpi()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert under_mpi()


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("PMI_SIZE", "PMI_RANK"),
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ],
)
def test_only_the_first_rank_speaks_of_a_wrong_option(
    names: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(names[0], "3")
    monkeypatch.setattr("sys.argv", ["preprocess", "--data", "a", "--out", "b", "--tokenizer", "c", "--workers", "2"])
    said = []
    for rank in range(3):
        monkeypatch.setenv(names[1], str(rank))
        said.append((main(), capsys.readouterr().err.count("the ranks of MPI are the workers")))
    assert said == [(2, 1), (0, 0), (0, 0)]


def test_a_lost_rank_ends_the_launches_that_are_advised(root: Path) -> None:
    """Slurm lets the other ranks wait for it, unless told."""
    said = [*(root / "README.md").read_text().splitlines(), (root / "data_prep/pool.py").read_text()]
    launches = [text for text in said if re.search(r"srun .*(make preprocess|--mpi=pmix or)", text)]
    assert len(launches) == 2
    assert all("--kill-on-bad-exit=1" in text for text in launches)


def test_ranks_that_mpi_does_not_join_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would take the whole work for its own."""

    class Alone:
        COMM_WORLD = type("World", (), {"Get_size": lambda self: 1})()
        Get_library_version = staticmethod(lambda: "Some MPI v4, package: x")

    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("data_prep.pool._import_mpi", lambda: (Alone, None))
    with (
        pytest.raises(BadInput, match="'Some MPI v4': 4 processes were started, but MPI joins this one with no"),
        ranks(),
    ):
        pass
