"""Keys and values of one decode in buffers made once: a new token is written in place, nothing before it is copied."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer


def preallocated_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """A cache for `capacity` tokens a row. Layers that do not simply grow, as with a window, stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):
    """A growing layer over fixed buffers [B, heads, capacity, D]; `keys` and `values` are views of the part in use."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.used = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, in the dtype and on the device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [self._buffer(states) for states in (key_states, value_states)]
        self._expose()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the old; all of them so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.used + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.used : end] = states
        self.used = end
        return self._expose()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only; they move to the front of the same buffers, which stay as large as they were."""
        for buffer in self._buffers:
            buffer[: len(indices), :, : self.used] = buffer[indices, :, : self.used]
        self._buffers = [buffer[: len(indices)] for buffer in self._buffers]
        self._expose()

    def _buffer(self, states: Tensor) -> Tensor:
        batch, heads, _, width = states.shape
        return torch.empty((batch, heads, self.capacity, width), dtype=self.dtype, device=states.device)

    def _expose(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, : self.used] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values
