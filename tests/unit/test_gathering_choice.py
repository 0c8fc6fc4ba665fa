"""Choice between weights gathered once and layer by layer: the rank that lacks most and the fullest one decide."""

import pytest
import torch

from distill.rollout.gathering import choose
from distill.topology import Topology


@pytest.mark.parametrize(("other_lacks", "other_free", "once"), [(0, 9.0, True), (4, 9.0, False), (0, 5.9, False)])
def test_all_ranks_decide_by_the_fullest(
    other_lacks: int, other_free: float, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank lacks 2 bytes and has 9 free; a copy may take a third."""
    topology = Topology(0, 2, 1, torch.device("cpu"), None, None)
    others = iter([other_lacks, -other_free])
    monkeypatch.setattr("distill.rollout.gathering.free_memory_bytes", lambda: 9.0)
    monkeypatch.setattr(Topology, "max_over_ranks", lambda self, value: max(value, next(others)))
    assert choose("auto", 2, topology).once == once
