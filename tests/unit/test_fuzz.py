"""Damaged input of any kind is refused as bad input or read: never another error, never half an output.

Each run tries the same few examples. For more, and others each time: FUZZ_EXAMPLES=2000 pytest tests/unit/test_fuzz.py
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, damaged_bytes, fuzz, texts, values

from data_prep.preprocess import run_preprocess
from data_prep.tokenize import Recipe
from distill.checks.deepspeed import check_deepspeed
from distill.checks.inputs import check_models_and_data
from distill.checks.report import Report
from distill.config import Config, dump, load
from distill.data.loading import InstructionRecords
from distill.data.records import open_records, read_manifest
from distill.doctor import examine
from distill.errors import BadInput
from distill.launching.command import plan
from distill.planning.zero import Zero

TREE: dict[str, Any] = {
    "run": {"folder": "runs/x", "seed": 1},
    "student": {"path": "/nowhere/s", "trust_remote_code": False},
    "teacher": {"path": "/nowhere/t"},
    "data": {"train": "d", "valid": "v"},
    "objective": {"name": "minillm", "preset": "default", "gamma": 0.9},
    "optim": {"steps": 3, "lr": 1e-5, "betas": [0.9, 0.95]},
    "rollout": {"stop": ["x"], "stop_ids": [3], "alpha": 0.1},
    "parallel": {"deepspeed": "ds.json", "student_tp": 2, "teacher_tp": 2},
    "log": {"wandb": "offline"},
}


@contextmanager
def folder() -> Iterator[Path]:
    """Hypothesis calls a test many times over; tmp_path is one for all of them."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def load_if_good(content: bytes, overrides: list[str]) -> None:
    """What is read must come back from its resolved copy, and the doctor must have an opinion of it."""
    with folder() as place:
        path = place / "run.yaml"
        path.write_bytes(content)
        try:
            config = load(path, overrides)
        except BadInput:
            return
        path.write_text(dump(config), encoding="utf-8")
        assert load(path) == config
        if all(model.path.startswith("/") for model in (config.student, config.teacher) if model):  # not on the hub
            examine(config, 4)


@fuzz
@given(damaged(TREE))
def test_damaged_recipes(tree: Any) -> None:
    load_if_good(yaml.safe_dump(tree).encode(), [])


@fuzz
@given(st.binary(max_size=200) | damaged_bytes(yaml.safe_dump(TREE).encode()))
def test_recipes_of_any_bytes(content: bytes) -> None:
    load_if_good(content, [])


_KEYS = st.sampled_from([f"{section}.{key}" for section, keys in TREE.items() for key in keys])


@fuzz
@given(st.lists(texts | st.builds("{}={}".format, _KEYS | texts, texts | values.map(str)), max_size=3))
def test_any_overrides(overrides: list[str]) -> None:
    load_if_good(yaml.safe_dump(TREE).encode(), overrides)


RECORD = {
    "id": 3,
    "instruction": "Shorten.",
    "input": "A long line.",
    "output": ["A line."],
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    "complete": True,
    "written_by": "me",
    "text": "Words.",
}
_LINES = st.one_of(
    damaged(RECORD).map(lambda record: json.dumps(record).encode()),
    damaged({key: value for key, value in RECORD.items() if key != "messages"}).map(lambda r: json.dumps(r).encode()),
    damaged_bytes(json.dumps(RECORD).encode()),
    st.binary(max_size=40),
)


@fuzz
@given(
    st.lists(_LINES, max_size=5),
    st.sampled_from(["chat", "alpaca", "plain"]),
    st.sampled_from(["instructions", "text"]),
    st.sampled_from(["fail", "skip"]),
    st.integers(1, 400),
)
def test_raw_data_of_any_bytes(
    models_dir: Path, lines: list[bytes], template: str, kind: Any, on_bad: Any, shard_bytes: int
) -> None:
    with folder() as place:
        (place / "a.jsonl").write_bytes(b"\n".join(lines))
        recipe = Recipe(str(models_dir / "student"), template, 60, 90)
        data = [str(place / "a.jsonl")]
        try:
            run_preprocess(data, place / "out", recipe, kind, on_bad=on_bad, shard_bytes=shard_bytes, workers=1)
        except BadInput:
            assert not (place / "out").exists()
            # Where the same command would go on from finished shards it says so; one that read nothing leaves nothing.
            kept = list(place.glob("out.partial/*/shards/*.json"))
            assert kept or not (place / "out.partial").exists()
        else:
            assert len(open_records(place / "out", kind, "OUT")) == read_manifest(place / "out", "OUT").counts["kept"]
            assert not (place / "out.partial").exists()


@pytest.fixture(scope="module")
def few_records(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("few")
    rows = [{"instruction": f"Say {n}.", "output": f"{n} it is."} for n in range(3)]
    (place / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(str(models_dir / "student"), "chat", 40, 60)
    run_preprocess([str(place / "a.jsonl")], place / "out", recipe, workers=1)
    return place / "out"


def examine_inputs(models_dir: Path, **changes: dict[str, str]) -> Report:
    """What the doctor says of models and data."""
    raw = {
        "run": {"folder": "runs/x"},
        "student": {"path": str(models_dir / "student")},
        "data": {"train": "/nowhere"},
        "objective": {"name": "sft"},
        "optim": {"steps": 2},
    }
    report = Report()
    check_models_and_data(Config.model_validate(raw | changes), report)
    return report


@fuzz
@given(st.data())
def test_damaged_folders_of_records(models_dir: Path, few_records: Path, data: st.DataObject) -> None:
    """What the doctor takes for good can be read to the end."""
    with folder() as place:
        copy = Path(shutil.copytree(few_records, place / "records"))
        path = data.draw(st.sampled_from(sorted(copy.iterdir())))
        if path.suffix == ".json" and data.draw(st.booleans()):
            path.write_text(json.dumps(data.draw(damaged(json.loads(path.read_text())))))
        else:
            path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
        if not examine_inputs(models_dir, data={"train": str(copy)}).problems:
            records = InstructionRecords(copy, "data.train")
            everything = range(len(records))
            records.batch(everything)
            records.prompts(everything)
            records.references(everything)


_MODEL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


@fuzz
@given(st.data())
def test_damaged_folders_of_models(models_dir: Path, data: st.DataObject) -> None:
    with folder() as place:
        copy = Path(shutil.copytree(models_dir / "student", place / "model"))
        path = copy / data.draw(st.sampled_from(_MODEL_FILES))
        if path.suffix == ".json" and data.draw(st.booleans()):
            path.write_text(json.dumps(data.draw(damaged(json.loads(path.read_text())))))
        else:
            path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
        examine_inputs(models_dir, student={"path": str(copy)})


@fuzz
@given(st.data(), st.sampled_from(["zero1", "zero2", "zero3", "zero3_offload", "zero3_tp"]))
def test_damaged_deepspeed_json(root: Path, data: st.DataObject, name: str) -> None:
    content = (root / f"ds_configs/{name}.json").read_bytes()
    tree = damaged(json.loads(content)).map(lambda found: json.dumps(found).encode())
    with folder() as place:
        path = place / "ds.json"
        path.write_bytes(data.draw(tree | damaged_bytes(content)))
        config = TREE | {"parallel": {"deepspeed": str(path)}}
        check_deepspeed(Config.model_validate(config), Report())
        with suppress(BadInput):
            Zero.of(path)


_HOSTS = st.text("ab-.:@1 #=\n\t[]$`'slots", max_size=40)
_LINES_OF_HOSTS = st.lists(st.sampled_from(["a slots=2", "b slots=2", "# c", "", "c slots=1 max_slots=2"]) | _HOSTS)


@fuzz
@given(
    st.binary(max_size=80) | _LINES_OF_HOSTS.map(lambda lines: "\n".join(lines).encode()),
    st.sampled_from(["--include", "--exclude"]),
    st.none() | st.text("ab@:,01x", max_size=8),
)
def test_hostfiles_of_any_bytes(content: bytes, flag: str, filtered: str | None) -> None:
    with folder() as place:
        path = place / "hosts"
        path.write_bytes(content)
        chosen = [] if filtered is None else [f"{flag}={filtered}"]
        try:
            launch = plan(["--hostfile", str(path), *chosen, "launch/train.sh"], {}, "/tmp/x.sh")
        except BadInput:
            return
        assert not any(host.startswith("-") or set(host) & set(" $`'[]") for host in launch.ssh.hosts)
