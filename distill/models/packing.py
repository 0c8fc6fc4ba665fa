"""Weights in the layout that the processor's bf16 kernels want, for as long as a model samples.

A product of few rows is over before the weights have been put in order: from memory as it stands it takes half as long
again as from a packed copy, and a decode step makes nothing but such products. Accelerators need none of this.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# The layout may depend on the number of rows; a decode batch has about this many.
_ROWS = 16


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by its packed copy. Never made: a plain layer becomes one for a while."""

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, without a gradient."""
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Let the plain linear layers of `model` multiply by packed copies, where that is faster. No gradient within.

    The copies are of the weights as they are now, as large as those, and gone afterwards.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _gains(module.weight)]
    for layer in layers:
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
        layer.__class__ = PackedLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            del layer.packed


def _gains(weight: Tensor) -> bool:
    cpu_bf16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return cpu_bf16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
