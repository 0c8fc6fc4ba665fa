"""Switch a model's dropout off for training, and keep gradient checkpointing on.

transformers recomputes a layer's activations only where the layer is in training mode, and there dropout is on. Here
every module goes into evaluation mode; a checkpointed layer keeps training mode for that one question alone and runs
its forward in evaluation mode.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def train_without_dropout(model: nn.Module) -> None:
    """Put the model into evaluation mode; layers with gradient checkpointing still recompute their activations.

    `model.train()` and `model.eval()` undo it.
    """
    model.eval()
    for layer in _checkpointed_layers(model):
        if not getattr(layer._gradient_checkpointing_func, "in_the_mode_of_children", False):
            layer._gradient_checkpointing_func = _in_the_mode_of_children(layer, layer._gradient_checkpointing_func)
        layer.training = True  # the layer's own flag: its children stay in evaluation mode


def _checkpointed_layers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module


def _in_the_mode_of_children(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap transformers' checkpointing function: the layer's forward runs in the mode that its children are in."""

    def run(forward: Callable[..., Any], *arguments: Any) -> Any:
        return checkpoint(partial(_forward_in_mode, layer, forward), *arguments)

    run.in_the_mode_of_children = True  # type: ignore[attr-defined]
    return run


def _forward_in_mode(layer: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Any:
    """Run the forward, and run it again for backward, with the layer's flag as its children have it."""
    before = layer.training
    layer.training = any(child.training for child in layer.children())
    try:
        return forward(*arguments)
    finally:
        layer.training = before
