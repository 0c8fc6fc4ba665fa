"""Models as the settings ask for them."""

from pathlib import Path

import pytest
import torch

from distill.config import ModelSettings
from distill.models.heads import hidden_states
from distill.models.loading import load_model


@pytest.mark.parametrize(
    ("checkpointing", "training", "forwards"), [(True, True, 2), (False, True, 1), (True, False, 1)]
)
def test_backward_recomputes_activations_where_asked_to(
    checkpointing: bool, training: bool, forwards: int, models_dir: Path
) -> None:
    settings = ModelSettings(path=str(models_dir / "student"), gradient_checkpointing=checkpointing)
    model = load_model(settings, torch.float32).train(training)
    calls: list[object] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    ids = torch.arange(6).view(2, 3)
    hidden_states(model, ids, torch.ones_like(ids), ids % 3).sum().backward()
    assert len(calls) == forwards
