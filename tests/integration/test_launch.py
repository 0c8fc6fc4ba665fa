"""What a user types, with real DeepSpeed ranks: training, resuming, exporting, and the errors in between."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

pytestmark = pytest.mark.slow

TIMINGS = ("time/", "memory/", "tokens/per_second")


@pytest.fixture
def recipe(models_dir: Path, records_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, objective: str, **optim: object) -> Path:
        config: dict[str, Any] = {
            "run": {"folder": str(tmp_path / name), "seed": 5},
            "student": {"path": str(models_dir / "student")},
            "teacher": {"path": str(models_dir / "teacher")},
            "data": {"train": str(records_dir / "train"), "valid": str(records_dir / "valid")},
            "objective": {"name": objective},
            "precision": "fp32",
            "rollout": {"max_new_tokens": 12, "per_round": 16, "inner_epochs": 2, "batch": 8},
            "optim": {"lr": 5e-3, "batch_size": 8, "micro_batch": 2, "steps": 10, "schedule": "cosine"} | optim,
            "evaluation": {"every": 5, "prompts": 7},
            "checkpoint": {"every": 3},
        }
        if objective == "sft":
            del config["rollout"]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def records(run: Path, figures_only: bool = True) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if figures_only:
        return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]
    return rows


def test_sft_then_minillm_then_export(
    recipe: Callable, launch: Callable, models_dir: Path, records_dir: Path, tmp_path: Path, root: Path
) -> None:
    sft = recipe("sft", "sft", steps=40, batch_size=16, micro_batch=4)
    launch("launch/train.sh", "--config", str(sft), "checkpoint.every=40", "evaluation.every=40")
    losses = [row["loss/sft"] for row in records(tmp_path / "sft") if "loss/sft" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    mini = recipe("mini", "minillm", steps=24, lr=3e-3, batch_size=16, micro_batch=8)
    launch(
        "launch/train.sh",
        "--config",
        str(mini),
        f"student.path={tmp_path / 'sft/student'}",
        f"data.plain_text={records_dir / 'text'}",
        "checkpoint.every=24",
        "evaluation.every=24",
    )
    rows = [row for row in records(tmp_path / "mini") if "student/reverse_kl" in row]
    kls = [row["student/reverse_kl"] for row in rows]
    assert sum(kls[-4:]) < 0.8 * sum(kls[:4])
    expected = {"loss/long", "loss/single", "teacher/entropy", "rollout/effective_sample_size", "optim/grad_norm"}
    expected |= {"policy/clip_fraction", "rollout/response_length", "rollout/eos_rate", "reward/mean", "optim/lr"}
    assert expected <= rows[0].keys()
    assert (tmp_path / "mini" / "samples.jsonl").read_text().count('"response"') == 12 * 4
    assert list((tmp_path / "mini" / "wandb").glob("offline-run-*/*.wandb")), "without a key wandb writes offline"

    out = tmp_path / "exported"
    subprocess.run(
        [sys.executable, "-m", "distill", "export", "--run", str(tmp_path / "mini"), "--out", str(out)],
        cwd=root,
        check=True,
    )
    # A process that cannot even import this project loads and runs the student.
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(out)!r}); t = AutoTokenizer.from_pretrained({str(out)!r})\n"
        "x = t('Name a fruit.', return_tensors='pt')\n"
        "y = m.generate(x.input_ids, max_new_tokens=3, do_sample=False, pad_token_id=0)\n"
        "assert y.shape[1] > x.input_ids.shape[1]\n"
        "assert 'distill' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    card = (out / "README.md").read_text()
    assert str(models_dir / "teacher") in card
    assert "valid/rouge_l" in card
    assert "preset: default" in card


def test_time_budget_ends_a_run(recipe: Callable, launch: Callable, tmp_path: Path) -> None:
    path = recipe("timed", "sft", steps=100000, max_minutes=0.02)
    launch("launch/train.sh", "--config", str(path), "evaluation.every=0", "checkpoint.every=100000")
    rows = records(tmp_path / "timed", figures_only=False)
    seconds = sum(row.get("time/step", 0) for row in rows)
    assert 1.2 <= seconds < 1.2 + max(row.get("time/step", 0) for row in rows) + 0.01
    assert (tmp_path / "timed" / "student" / "config.json").exists()


def test_a_model_with_an_unknown_head_is_refused(
    recipe: Callable, launch: Callable, models_dir: Path, tmp_path: Path
) -> None:
    """Known only when its weights, sharded by ZeRO-3, are read: both ranks must find it."""
    config = LlamaConfig.from_pretrained(models_dir / "student").to_dict() | {"logits_scaling": 0.125}
    config = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    scaled = AutoModelForCausalLM.from_config(AutoConfig.for_model("hyperclovax", **config))
    scaled.save_pretrained(tmp_path / "scaled")
    AutoTokenizer.from_pretrained(models_dir / "student").save_pretrained(tmp_path / "scaled")
    path = recipe("refused", "sft")
    done = launch("launch/train.sh", "--config", str(path), f"student.path={tmp_path / 'scaled'}", check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("HyperCLOVAXForCausalLM makes other logits") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("starter", ["deepspeed", "bash"])
def test_bad_input_ends_with_one_clear_error(
    starter: str, recipe: Callable, environment: dict, free_port: Callable, root: Path, tmp_path: Path
) -> None:
    path = recipe("bad", "minillm")
    flags = ["--num_accelerators", "2", "--master_port", str(free_port())]
    head = ["deepspeed", *flags, "launch/train.sh"] if starter == "deepspeed" else ["bash", "launch/train.sh", *flags]
    command = [*head, "--config", str(path), "teacher.path=/no/such/model", "optim.batch_size=7"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("distill: teacher.path = '/no/such/model': no such folder") == 1
    assert done.stderr.count("distill: optim.batch_size = 7: does not divide over 2 data-parallel ranks") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()


def test_bash_starts_the_same_run(
    recipe: Callable, environment: dict, free_port: Callable, root: Path, tmp_path: Path
) -> None:
    path = recipe("bashed", "sft")
    port = str(free_port())
    command = [
        "bash",
        "launch/train.sh",
        "--num_accelerators=2",
        "--master_port",
        port,
        "--config",
        str(path),
    ]
    done = subprocess.run(
        [*command, "optim.steps=2"], cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "shared memory is given back"
    assert [row["step"] for row in records(tmp_path / "bashed") if "loss/sft" in row] == [1, 2]


def test_torchrun_starts_ranks_too(recipe: Callable, environment: dict, root: Path, tmp_path: Path) -> None:
    """Its agent listens at the meeting point itself."""
    command = ["torchrun", "--standalone", "--max-restarts", "1", "--nproc-per-node", "2"]
    command += ["-m", "distill", "train", "--config"]
    where = {"cwd": root, "env": environment, "capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run([*command, str(recipe("run", "sft")), "optim.steps=2"], **where)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in records(tmp_path / "run") if "loss/sft" in row] == [1, 2]
    assert "failed to bind" not in done.stderr
    done = subprocess.run([*command, str(recipe("bad", "sft")), "optim.batch_size=3"], **where)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("distill: ")]
    wrong = "distill: optim.batch_size = 3: does not divide over 2 data-parallel ranks"
    assert sum(line.startswith(wrong) for line in said) == 2, "once for each start"
    assert not any("--master_port" in line for line in said)
