"""Real ZeRO-3 ranks: gathering once and fetching layer by layer sample the same, and leave nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.config import RolloutSettings
from distill.rollout.gathering import choose
from distill.rollout.sampling import coins
from distill.topology import Topology

LIMIT = 24


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Nothing of these small models may stay whole on every rank."""
    settings = json.loads((root / "ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path_factory.mktemp("zero3") / "zero3.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.slow
def test_layer_by_layer_equals_gathered_once(launch: Callable, models_dir: Path, zero3: Path, tmp_path: Path) -> None:
    launch("tests/ranks/gather_modes.py", str(models_dir), str(tmp_path / "out.json"), str(zero3))
    for rank, found in enumerate(json.loads((tmp_path / "out.json").read_text())):
        for mode in ("shared", "per_row"):
            once, layer, auto = (found[f"{mode} {gather}"] for gather in ("once", "layer", "auto"))
            assert (once["once"], layer["once"], auto["once"]) == (True, False, True)
            assert layer["ids"] == once["ids"] == auto["ids"]
            assert layer["lengths"] == [3 + 8 * rank] * 5
            torch.testing.assert_close(torch.tensor(layer["teacher"]), torch.tensor(once["teacher"]))
            assert once["missing"] > 0
            assert once["released"]
            assert layer["released"]
            assert once["calls"] == sum(student_forwards(mode, [rank]))
            assert layer["calls"] == sum(student_forwards(mode, [0, 1]))


def student_forwards(mode: str, ranks: list[int]) -> list[int]:
    """In each batch, for ranks that keep step: where a coin of any names the student, until a look finds all at their
    end; and once more where it has not read that far."""
    settings = RolloutSettings(max_new_tokens=LIMIT, alpha=0.4, coins=mode)
    longest = max(3 + 8 * rank for rank in ranks)
    looked = -(-longest // 4) * 4  # all look every 4 tokens: nobody decodes to the limit
    found = []
    for rows in torch.arange(5).split(3):
        flips = [coins(settings, 0, 0, rows * 2 + rank) for rank in ranks]
        asked = (~torch.cat(flips)).any(0)[:looked].nonzero()
        found.append(len(asked) + int(int(asked.max()) + 1 < longest))
    return found


def test_auto_gathers_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Topology(0, 1, 1, torch.device("cpu"), None, None)
    monkeypatch.setattr("distill.rollout.gathering.free_memory_bytes", lambda: 3 * 2**30)
    monkeypatch.setattr(Topology, "max_over_ranks", lambda self, value: value)
    small, large = choose("auto", 2**30, alone), choose("auto", 2**30 + 1, alone)
    assert (small.once, large.once) == (True, False)
    assert "1.00 GiB" in small.why
    assert "3.00 GiB free" in large.why
    assert choose("layer", 1, alone).once is False
    assert choose("layer", 0, alone).once is True
