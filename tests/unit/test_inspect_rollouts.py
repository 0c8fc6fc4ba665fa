"""What a person reads of a run's rollouts is what the checkpoint holds."""

import sys
from pathlib import Path

import pytest
import torch
from run_configs import checkpoint
from transformers import PreTrainedTokenizerFast

from distill.config import RESOLVED, Config, dump
from distill.data.batches import Rollouts
from tools.inspect_rollouts import describe, main, no_paint, paint


@pytest.fixture
def rollouts(tokenizer: PreTrainedTokenizerFast) -> Rollouts:
    ids = tokenizer.encode("and the end<eos>")
    prompt = tokenizer.encode("<|user|>what")
    teacher = torch.tensor([[False, True] + [False] * (len(ids) - 2)])
    steps = torch.arange(1.0, len(ids) + 1)[None]
    return Rollouts(
        prompt_ids=torch.tensor([[0, 0, *prompt]]),
        prompt_lengths=torch.tensor([len(prompt)]),
        response_ids=torch.tensor([ids]),
        response_lengths=torch.tensor([len(ids)]),
        behavior_logprobs=-steps,
        teacher_logprobs=-steps - torch.where(teacher, -0.25, 0.125),
        importance_weights=1.25 / steps,
        from_teacher=teacher,
        ended=torch.tensor([True]),
    )


def config(models_dir: Path, run: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": str(run)},
            "student": {"path": str(models_dir / "student")},
            "data": {"train": "x"},
            "objective": {"name": "minillm", "reward_scale": 0.5},
            "optim": {"steps": 1},
        }
    )


def test_every_token_has_its_source_scores_reward_and_weight(
    rollouts: Rollouts, tokenizer: PreTrainedTokenizerFast, models_dir: Path, tmp_path: Path
) -> None:
    text = describe(rollouts, 0, tokenizer, config(models_dir, tmp_path), no_paint)
    ids = rollouts.response_ids[0].tolist()
    assert f"{len(ids)} tokens, ended, {1 / len(ids):.0%} from the teacher" in text
    assert "<|user|>what\n" in text
    lines = text.splitlines()[-len(ids) :]
    assert [line.split()[1] for line in lines] == ["student", "teacher"] + ["student"] * (len(ids) - 2)
    # log q, log p, (log p − log q) / 0.5, w of the first two tokens.
    assert lines[0].split()[-4:] == ["-1.000", "-1.125", "-0.250", "1.250"]
    assert lines[1].split()[-4:] == ["-2.000", "-1.750", "0.500", "0.625"]


def test_colours_tell_the_sources_apart(
    rollouts: Rollouts, tokenizer: PreTrainedTokenizerFast, models_dir: Path, tmp_path: Path
) -> None:
    text = describe(rollouts, 0, tokenizer, config(models_dir, tmp_path), paint)
    first, second = (tokenizer.decode([index]) for index in rollouts.response_ids[0, :2].tolist())
    assert f"\x1b[36m{first}\x1b[0m\x1b[33m{second}\x1b[0m" in text


def test_command_reads_the_last_checkpoint_of_every_rank(
    rollouts: Rollouts,
    models_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect_rollouts", str(tmp_path)])
    assert main() == 2
    assert "no checkpoint there; name the folder of a run" in capsys.readouterr().err
    checkpoint(tmp_path, 1, world_size=2)
    (tmp_path / RESOLVED).write_text(dump(config(models_dir, tmp_path)))
    assert main() == 2
    assert "holds no rollouts" in capsys.readouterr().err
    tensors = rollouts.tensors()
    checkpoint(tmp_path, 2, world_size=2, rollouts_0=tensors, rollouts_1=tensors)
    assert main() == 0
    out = capsys.readouterr().out
    assert "rank 0, rollout 1 of 1" in out
    assert "rank 1, rollout 1 of 1" in out
    assert "\x1b" not in out
