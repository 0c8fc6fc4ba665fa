"""What stays on disk: the newest checkpoints and the best, never a leftover in the place of a good one."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_configs import checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from distill.checkpoint import saving
from distill.checkpoint.catalog import Damaged, RunState, candidates, newest, read, set_aside
from distill.checkpoint.claim import claim
from distill.checkpoint.disk import HashedFile, write_file, wrong_with
from distill.checkpoint.restoring import deal
from distill.checkpoint.saving import Saver
from distill.checkpoint.tensor_file import TensorFile, serialise
from distill.checkpoint.writer import FileWriter
from distill.data.batches import Rollouts
from distill.data.folders import recover_folder, replace_folder
from distill.errors import BadInput
from distill.records_file import Records
from distill.topology import Topology


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Topology:
    monkeypatch.setattr(Topology, "gather_objects", lambda self, value: [value])
    return Topology(0, 1, 1, torch.device("cpu"), None, None)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def saver(alone: Topology, tmp_path: Path, said: list[str]) -> Saver:
    return Saver(tmp_path, alone, 1, 2, said.append)


def save(saver: Saver, step: int, best_step: int | None = None) -> None:
    saver.begin(RunState(step=step, best_step=best_step), {"shard-0.safetensors": TensorFile({"x": torch.ones(3)})})
    saver.finish()


def kept(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-000000") for path in (folder / "checkpoints").glob("step-*"))


def test_the_newest_and_the_best_are_kept(saver: Saver, tmp_path: Path, said: list[str]) -> None:
    for step in (1, 2, 3, 4, 5):
        save(saver, step, best_step=2 if step > 1 else None)
    assert kept(tmp_path) == ["2", "4", "5"]
    found, damaged = newest(tmp_path)
    assert found is not None
    assert (found.tag, found.state.step, found.state.best_step, found.world_size) == ("step-0000005", 5, 2, 1)
    assert (damaged, said) == ({}, [])


@pytest.mark.parametrize(
    "leftover", ["step-0000009", "step-0000009.partial", "step-0000005.partial", "step-0000004.gone"]
)
def test_what_a_kill_left_behind_never_pushes_out_a_good_one(saver: Saver, tmp_path: Path, leftover: str) -> None:
    save(saver, 4)
    (tmp_path / "checkpoints" / leftover).mkdir()
    save(saver, 6)
    assert kept(tmp_path) == ["4", "6"]
    assert newest(tmp_path)[0].state.step == 6  # type: ignore[union-attr]


def test_what_is_saved_is_what_was_there(saver: Saver, tmp_path: Path) -> None:
    """Training goes on while the files are written: it changes its own tensors."""
    tensor = torch.arange(6.0).view(2, 3)
    saver.begin(RunState(step=1), {"shard-0.safetensors": TensorFile({"x": tensor}, {"notes": "of it"})})
    tensor.zero_()
    saver.finish()
    path = tmp_path / "checkpoints/step-0000001/shard-0.safetensors"
    assert torch.equal(load_file(path)["x"], torch.arange(6.0).view(2, 3))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"notes": "of it"}


@pytest.mark.parametrize(("free", "ranks", "overlaps"), [(0, 1, False), (31, 1, False), (32, 1, True), (63, 2, False)])
def test_little_memory_only_costs_the_overlap(
    free: float, ranks: int, overlaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of these 16 bytes may take half of a rank's share of what is free."""
    monkeypatch.setattr("distill.checkpoint.writer.free_host_memory_bytes", lambda: free)
    content = {"a.safetensors": TensorFile({"part": torch.arange(10)[3:5]})}
    writer = FileWriter(tmp_path, content, ranks)
    assert (writer._thread is not None) == overlaps
    writer.wait()
    assert writer.error is None
    assert load_file(tmp_path / "a.safetensors")["part"].tolist() == [3, 4]
    assert wrong_with(tmp_path / "a.safetensors", writer.records["a.safetensors"]) is None
    assert (tmp_path / "a.safetensors").stat().st_size < 200, "not the whole storage that it is a part of"


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (48,), dtype=torch.uint8)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)
    tensors = {str(dtype): bits.view(dtype) for dtype in dtypes}
    tensors |= {"bool": torch.tensor([True, False, True]), "scalar": torch.tensor(3.0), "none": torch.empty(0, 4)}
    tensors["across"] = torch.arange(12).view(3, 4).T
    record = write_file(tmp_path / "file", lambda file: serialise(TensorFile(tensors), file))
    assert wrong_with(tmp_path / "file", record) is None
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, theirs), name
        assert found[name].shape == tensor.shape


def test_every_tensor_begins_where_its_type_may(tmp_path: Path) -> None:
    """Who maps the file into memory reads them where they lie."""
    names = {torch.uint8: 1, torch.float16: 2, torch.float32: 4, torch.float64: 8}
    for length in range(8):
        tensors = {f"{'n' * length}{size}": torch.ones(3, dtype=dtype) for dtype, size in names.items()}
        write_file(tmp_path / "file", lambda file, tensors=tensors: serialise(TensorFile(tensors), file))
        content = (tmp_path / "file").read_bytes()
        header = int.from_bytes(content[:8], "little")
        assert header % 8 == 0
        begins = {name: about["data_offsets"][0] for name, about in json.loads(content[8 : 8 + header]).items()}
        assert [begin % tensors[name].element_size() for name, begin in begins.items()] == [0] * len(begins)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights is missing": lambda folder: (folder / "weights").unlink(),
    "weights has 8 of 7 bytes": lambda folder: (folder / "weights").write_text("weights!"),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is not whole": lambda folder: os.truncate(folder / "manifest.json", 90),
    "manifest.json is not what was written": lambda folder: altered(folder, "content", "world_size", 3),
    "manifest.json has format 2": lambda folder: altered(folder, "format", None, 2),
}


def altered(folder: Path, key: str, inner: str | None, value: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    if inner is None:
        manifest[key] = value
    else:
        manifest[key][inner] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("wrong", DAMAGES)
def test_damage_is_found_and_named(wrong: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    DAMAGES[wrong](checkpoint(tmp_path, 2))
    with pytest.raises(Damaged, match=wrong):
        read(tmp_path / "checkpoints", "step-0000002")
    found, damaged = newest(tmp_path)
    assert found is not None
    assert found.tag == "step-0000001"
    assert wrong in damaged["step-0000002"]


def test_a_flipped_bit_is_found_by_reading(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    record = read(tmp_path / "checkpoints", "step-0000001").files["weights"]
    (folder / "weights").write_text("weightz")
    assert wrong_with(folder / "weights", record) == "weights is not what was written (checksum)"


@pytest.mark.parametrize("pointer", [None, b"", b"\xff", b"global_step3"])
def test_without_a_pointer_the_newest_is_taken(pointer: bytes | None, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    root = tmp_path / "checkpoints"
    assert candidates(root) == ["step-0000003", "step-0000002", "step-0000001"]
    set_aside(root, "step-0000002")
    (root / "latest").unlink()
    if pointer is not None:
        (root / "latest").write_bytes(pointer)
    assert candidates(root) == ["step-0000003", "step-0000001"]


def test_a_pointer_to_an_earlier_one_is_obeyed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoints/latest").write_text("step-0000002\n")
    assert candidates(tmp_path / "checkpoints") == ["step-0000002", "step-0000001"]


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["write", "publish", "prune"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    place: str, saver: Saver, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(saver, 1)
    where: Any = HashedFile if place == "write" else saving
    with monkeypatch.context() as patched:
        patched.setattr(where, place, full)
        save(saver, 2)
    assert "No space left on device" in said[0]
    assert kept(tmp_path) == (["1", "2"] if place == "prune" else ["1"])
    save(saver, 3)
    assert newest(tmp_path)[0].state.step == 3  # type: ignore[union-attr]
    assert len(said) == 1


def test_a_disk_too_small_is_foreseen(
    saver: Saver, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    save(saver, 7)
    assert kept(tmp_path) == []
    assert said[0].startswith("step-0000007 is not saved: it takes ")
    assert said[0].endswith("the run goes on without a checkpoint so far")


def test_a_disk_has_room_for_the_parts_of_all_ranks(
    saver: Saver, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = (10**9, 0, None)
    monkeypatch.setattr(Topology, "gather_objects", lambda self, value: [value, others])
    usage = type("Usage", (), {"free": 10**9})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    save(saver, 7)
    assert kept(tmp_path) == []
    assert said[0].startswith("step-0000007 is not saved: it takes 1.05 GB, the disk has 1;")


def test_the_pointer_moves_last(saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before a checkpoint has its name leaves the one before in its place."""
    rename = Path.rename

    def killed_before(path: Path, target: Path) -> Path:
        if path.name == "step-0000002.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    save(saver, 1)
    monkeypatch.setattr(Path, "rename", killed_before)
    save(saver, 2)
    assert (tmp_path / "checkpoints/latest").read_text() == "step-0000001"


def test_an_error_that_is_not_the_disks_is_raised(saver: Saver) -> None:
    saver.begin(RunState(step=1), {"x": TensorFile({"x": torch.ones(2, dtype=torch.complex64)})})
    with pytest.raises(KeyError):
        saver.finish()


def test_a_serialiser_cannot_hide_what_the_disk_says() -> None:
    def serialise_badly(file: HashedFile) -> None:
        try:
            file.write(bytes(10**6))
        except OSError:
            raise RuntimeError("failed to write") from None

    with pytest.raises(OSError, match="No space"):
        write_file(Path("/dev/full"), serialise_badly)


def rollouts(ids: list[int]) -> Rollouts:
    """A rollout a row, that begins with its id, of a width of its own."""
    count, width = len(ids), 1 + max(ids) % 3
    responses = torch.zeros(count, width, dtype=torch.long)
    responses[:, 0] = torch.tensor(ids)
    ones, figures = torch.ones(count, dtype=torch.long), torch.zeros(count, width)
    return Rollouts(
        prompt_ids=responses[:, :1],
        prompt_lengths=ones,
        response_ids=responses,
        response_lengths=ones * width,
        behavior_logprobs=figures,
        teacher_logprobs=figures,
        importance_weights=figures,
        from_teacher=figures.bool(),
        ended=ones.bool(),
    )


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (2, 4), (4, 2), (3, 1)])
def test_rollouts_are_dealt_out_as_if_sampled_on_that_many_replicas(before: int, after: int) -> None:
    total = 24
    parts = [rollouts(list(range(rank, total, before))) for rank in range(before)]
    for rank in range(after):
        ours = deal(parts, rank, after)
        assert ours is not None
        assert ours.response_ids[:, 0].tolist() == list(range(rank, total, after))
    assert deal([], 0, 1) is None


def test_a_student_set_aside_by_a_kill_comes_back(tmp_path: Path) -> None:
    final, new = tmp_path / "student", tmp_path / "student.partial"
    (tmp_path / "student.old").mkdir()
    recover_folder(final)
    assert final.exists()
    new.mkdir()
    (new / "weights").write_text("new")
    replace_folder(new, final)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    (tmp_path / "student.old").mkdir()
    recover_folder(final)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert (final / "weights").read_text() == "new"


def test_records_outlive_kills_and_full_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    records = Records(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        records.append({"step": 3})
        records.append({"step": 4})
        with pytest.raises(OSError, match="No space"):
            records.flush()
    with path.open("a") as file:
        file.write('{"step": 3')  # what a full disk took of the line
    records.append({"step": 5, "text": "ü"})
    records.flush()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_one_run_at_a_time_in_a_folder(tmp_path: Path, alone: Topology, environment: dict[str, str]) -> None:
    """Held until the process ends, by whatever."""
    claimed = (
        "from distill.checkpoint.claim import _lock; import pathlib, sys, time; print(_lock(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-u", "-c", f"{claimed}; time.sleep(60)", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "None\n"
        with pytest.raises(BadInput, match="another run is at work in it"):
            claim(tmp_path / "run", alone)
        other.kill()
    claim(tmp_path / "run", alone)
