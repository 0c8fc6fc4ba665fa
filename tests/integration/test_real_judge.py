"""`distill judge` on a real evaluation, with real models behind a real server: `transformers serve`."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

from distill import cli
from distill.errors import EXIT_FAILED
from distill.evaluation.judge.prompts import prompt

pytestmark = pytest.mark.slow

ROWS = 3
PAIR = ("--pair", "one", "other")
SAYS = ('{"better"', ": 1, ", '"points_1"', ": 6, ", '"points_2"', ": 9}")
"""Fits both kinds of questions; a token each, so that the last one tells the next."""


@dataclass
class Served:
    url: str
    model: str
    log: Path

    @property
    def requests(self) -> int:
        """That were answered well, by the server's own account."""
        return self.log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200')


@contextmanager
def serving(model: Path, port: int, log: Path) -> Iterator[Served]:
    """`transformers serve` in a process of its own, which is gone at the end."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "error"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=offline)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield Served(f"http://127.0.0.1:{port}/v1", str(model), log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory,
    models_dir: Path,
    corpus: list[str],
    environment: dict[str, str],
    root: Path,
) -> Path:
    """The folder of a real evaluation of two models."""
    folder = tmp_path_factory.mktemp("judged")
    lines = [json.dumps({"instruction": text[:80], "output": text[:20]}) for text in corpus[:ROWS]]
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n")
    suite = {"sets": {"held-out": str(folder / "set.jsonl")}, "template": "plain", "max_new_tokens": 8}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite | {"seeds": [1, 2], "precision": "fp32"}))
    command = [sys.executable, "-m", "distill", "evaluate", "--suite", str(folder / "suite.yaml")]
    command += ["--model", f"one={models_dir / 'student'}", "--model", f"other={models_dir / 'teacher'}"]
    done = subprocess.run(
        [*command, "--out", str(folder / "out")], cwd=root, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory, models_dir: Path, corpus: list[str]) -> Path:
    """A judge that was trained, here and now, to say one thing whatever it is asked."""
    folder = tmp_path_factory.mktemp("decided")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models_dir / "student")
    tokenizer.add_tokens(list(SAYS))
    model = tiny_llama(len(tokenizer), 1, 3, initializer_range=0.1, max_position_embeddings=2048).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    said = tokenizer("".join(SAYS) + "<eos>")["input_ids"]
    assert len(said) == len(SAYS) + 1
    for step in range(40):
        texts = [corpus[(3 * step + place) % len(corpus)][:60] for place in range(3)]
        turn = {"role": "user", "content": prompt("pairs" if step % 2 else "score", *texts)}
        asked = tokenizer.apply_chat_template([turn], add_generation_prompt=True)["input_ids"]
        labels = torch.tensor([[-100] * len(asked) + said])
        loss = model(input_ids=torch.tensor([asked + said]), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def judge(folder: Path, served: Served, *flags: str) -> int:
    words = [
        "judge",
        str(folder),
        "--judge-url",
        served.url,
        "--judge-model",
        served.model,
        "--key-variable",
        "ANY_KEY",
    ]
    return cli.main([*words, "--concurrency", "2", *flags])


def judgements(folder: Path, model: str) -> list[dict[str, Any]]:
    content = json.loads((folder / "judge.json").read_text())
    return [entry for entry in content["judgements"] if entry["judge"] == model]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY_KEY", "any")


def test_nonsense_of_a_real_model_is_counted_as_such_and_nothing_is_lost(
    evaluated: Path,
    models_dir: Path,
    free_port: Callable[[], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (*PAIR, "--seed", "1", "--asks", "2", "--judge-max-tokens", "12")
    with serving(models_dir / "student", free_port(), tmp_path / "log") as served:
        assert judge(evaluated, served, *flags) == EXIT_FAILED
        said = capsys.readouterr()
        assert f"{2 * ROWS} questions have no verdict:" in said.err
        assert f"0 of {2 * ROWS}" in said.out
        assert served.requests == 2 * 2 * ROWS
        assert judge(evaluated, served, *flags) == EXIT_FAILED
        assert served.requests == 2 * 2 * ROWS
    (entry,) = judgements(evaluated, served.model)
    assert (entry["verdicts"], entry["replies"], entry["unparsable_replies"]) == (0, 4 * ROWS, 4 * ROWS)
    assert entry["figures"] == {}
    assert len(entry["missing"]) == 2 * ROWS
    assert entry["tokens"]["completion"] == 12 * 4 * ROWS
    assert entry["tokens"]["prompt"] > 100 * 4 * ROWS
    (path,) = (evaluated / "judge").glob("*student.replies.jsonl")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(kept) == 4 * ROWS
    assert all(line["reply"]["text"] for line in kept)


def test_verdicts_of_a_real_model_become_figures(
    evaluated: Path, decided: Path, free_port: Callable[[], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says that the first is better, always, so nobody wins; and gives the first 6 points and the second 9."""
    with serving(decided, free_port(), tmp_path / "log") as served:
        assert judge(evaluated, served, *PAIR) == 0
        assert served.requests == 2 * 2 * ROWS
        assert judge(evaluated, served, "--model", "one") == 0
        assert served.requests == 2 * 2 * ROWS + 2 * ROWS
    pairs, scores = judgements(evaluated, served.model)
    assert (pairs["verdicts"], pairs["replies"], pairs["missing"]) == (4 * ROWS, 4 * ROWS, [])
    assert pairs["figures"]["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert pairs["figures"]["disagreement"]["value"] == 1
    # Rows 0 and 2 have the response first, row 1 the reference.
    assert scores["figures"]["score"]["value"] == pytest.approx((6 + 9 + 6) / 3)
    assert scores["figures"]["reference"]["value"] == pytest.approx((9 + 6 + 9) / 3)
    assert scores["figures"]["ratio"]["value"] == pytest.approx(21 / 24)
    assert "one against other" in capsys.readouterr().out
