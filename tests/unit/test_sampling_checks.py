"""What the engine that is to sample needs of a run and of a machine, seen before a model loads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from run_configs import change, problems, started
from transformers import LlamaConfig, MixtralConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from distill.config import Config
from distill.doctor import examine


@pytest.fixture
def vllm_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that can serve vLLM."""
    monkeypatch.setattr("distill.checks.sampling.find_spec", lambda name: name)
    computes_on(monkeypatch, "cuda")


def computes_on(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("distill.checks.sampling.get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))


def on_vllm(good: dict, **changes: object) -> dict:
    return good | {"rollout": good["rollout"] | {"engine": "vllm", "alpha": 0} | changes}


@pytest.mark.usefixtures("vllm_machine")
def test_vllm_serves_the_student_alone_and_whole(good: dict) -> None:
    assert problems(on_vllm(good, vllm_memory=0.5)) == []
    mixing = "it samples the student alone, rollout.alpha = 0.2 mixes the teacher in; give rollout.engine=builtin, or"
    cases = [
        (on_vllm(good, alpha=0.2), mixing),
        (on_vllm(good, gather="layer"), "takes the student's whole weights, rollout.gather = layer keeps them apart"),
        (on_vllm(good) | {"parallel": {"student_tp": 2, "teacher_tp": 2}}, "of rows of its own; TP 2 shares them"),
        (on_vllm(good) | {"parallel": {"student_tp": 1, "teacher_tp": 2}}, "of rows of its own; TP 2 shares them"),
    ]
    for config, wanted in cases:
        assert any(line.startswith("rollout.engine = 'vllm'") and wanted in line for line in problems(config)), wanted


def test_vllm_needs_its_package_and_a_cuda_device(good: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.checks.sampling.find_spec", lambda name: None)
    computes_on(monkeypatch, "cpu")
    found = problems(on_vllm(good))
    assert len(found) == 2
    assert "vllm is not installed; install it as the README's `Sampling with vLLM` says" in found[0]
    assert "it serves CUDA devices, this machine computes on cpu; give rollout.engine=builtin" in found[1]


def test_vllm_is_refused_where_nothing_reads_it(good: dict) -> None:
    rollout = {"engine": "vllm", "alpha": 0.0}
    alone = problems(good | {"objective": {"name": "sft"}, "rollout": rollout})
    assert any("rollout.engine = 'vllm': objective sft does not read it; remove it" in line for line in alone)
    mixable = Config.model_validate(good | {"objective": {"name": "kd"}, "rollout": rollout})
    assert any(notice.startswith("rollout.engine: kd at on_policy = 0.0") for notice in examine(mixable, 2).notices)
    wrong = "rollout.vllm_memory = 0.5: only engine vllm reads it; remove it"
    assert problems(change(good, "rollout.vllm_memory", 0.5)) == [wrong]


@pytest.mark.usefixtures("vllm_machine")
@pytest.mark.parametrize("mixture", [MixtralConfig, Qwen3MoeConfig])
def test_vllm_takes_dense_models(good: dict, mixture: type, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The experts of others are fused under names that no checkpoint has."""
    tokenizer.save_pretrained(tmp_path)
    config = change(on_vllm(good), "student.path", str(tmp_path))
    for student, wanted in ((mixture(vocab_size=600), 1), (LlamaConfig(vocab_size=600), 0)):
        student.save_pretrained(tmp_path)
        found = [line for line in problems(config) if "experts" in line]
        assert len(found) == wanted
        assert all("takes over the weights of dense models, the student has" in line for line in found)
    assert problems(change(good, "student.path", str(tmp_path / "none")))[0].startswith("student.path")


@pytest.mark.usefixtures("vllm_machine")
def test_a_run_continues_with_another_share_of_memory_for_vllm(good: dict) -> None:
    started(on_vllm(good))
    assert problems(on_vllm(good, vllm_memory=0.2)) == []
    found = problems(on_vllm(good, vllm_memory=0.2, temperature=0.5))
    assert len(found) == 1
    assert "rollout.temperature = 0.5: the run in" in found[0]
