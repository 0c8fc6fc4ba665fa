"""Real ZeRO-3 ranks: gathering once and fetching layer by layer sample the same, and leave nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.rollout.gathering import choose
from distill.topology import Topology

LIMIT, BATCHES = 24, 2


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
        for coins in ("shared", "per_row"):
            once, layer, auto = (found[f"{coins} {gather}"] for gather in ("once", "layer", "auto"))
            assert (once["once"], layer["once"], auto["once"]) == (True, False, True)
            assert layer["ids"] == once["ids"] == auto["ids"]
            assert layer["lengths"] == [3 + 8 * rank] * 5
            torch.testing.assert_close(torch.tensor(layer["teacher"]), torch.tensor(once["teacher"]))
            assert once["missing"] > 0
            assert once["released"]
            assert layer["released"]
            # The slowest rank ends after 11 tokens and all look every 4: nobody decodes to the limit.
            assert layer["calls"] == 12 * BATCHES
            assert once["calls"] == (4 if rank == 0 else 12) * BATCHES


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
