"""What must hold before a run starts on CUDA, as far as it can be told without a device."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.checks import deepspeed as checks
from distill.checks.report import Report

OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with CUDA and no compiler; the folder is its path."""
    monkeypatch.setattr(checks, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def said(zero: dict[str, object]) -> list[str]:
    report = Report()
    checks._check_compilers(zero, "in zero3_offload.json", report)
    return [str(problem) for problem in report.problems]


def install(path: Path, name: str) -> None:
    path.mkdir(exist_ok=True)
    (path / name).write_text("#!/bin/sh\n")
    (path / name).chmod(0o755)


def test_offload_needs_compilers(on_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = said(OFFLOAD)
    assert [text.split("there is no ")[1].split(";")[0] for text in missing] == ["g++", "nvcc"]
    assert all("without offload_optimizer" in text for text in missing)
    install(on_cuda, "g++")
    install(on_cuda / "bin", "nvcc")
    assert len(said(OFFLOAD)) == 1
    monkeypatch.setenv("CUDA_HOME", str(on_cuda))
    assert said(OFFLOAD) == []


def test_an_architecture_that_deepspeed_cannot_read(on_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("g++", "nvcc"):
        install(on_cuda, name)
    for readable in ("9.0", "8.0;9.0+PTX", "8.0 9.0 10.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", readable)
        assert said(OFFLOAD) == []
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    (text,) = said(OFFLOAD)
    assert "cannot read 9.0a" in text
    assert "TORCH_CUDA_ARCH_LIST='8.0;9.0'" in text


def test_nothing_else_needs_a_compiler(on_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    for zero in ({"stage": 3}, {"stage": 1}, {"stage": 3, "offload_param": {"device": "cpu"}}):
        assert said(zero) == []
    monkeypatch.setattr(checks, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cpu"))
    assert said(OFFLOAD) == []


def test_no_process_of_ours_takes_cudnns_attention(root: Path, environment: dict[str, str]) -> None:
    script = (
        "import torch; from distill.topology import start, stop; before = torch.backends.cuda.cudnn_sdp_enabled();"
        "start(); print(before, torch.backends.cuda.cudnn_sdp_enabled()); stop()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["True", "False"], done.stderr
