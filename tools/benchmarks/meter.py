"""What a rank holds and sends, seen at every operation: bytes of living tensors, and bytes of its collectives.

On an accelerator `max_memory_allocated` knows the first; a processor's resident memory says little of it, since the C
library keeps what is freed. The dispatcher sees every tensor that an operation gives out and every collective of
torch.distributed, DeepSpeed's among them. What a kernel takes and gives back within one operation it does not see.
"""

import weakref
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of a tensor of S bytes over n ranks each of them sends so many times S · (n − 1)/n in a ring.
_TIMES = {"allgather": 1, "reduce_scatter": 1, "allreduce": 2, "inference_all_reduce": 2, "broadcast": 1}


class Meter(TorchDispatchMode):
    """While it is entered: `live` and `peak` bytes of tensors made within, and bytes `sent` by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sent: Counter[str] = Counter()
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def restart(self) -> None:
        """Let the peak start at what lives now."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and look at what came out."""
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "deepspeed"):
            self._note_collective(func.__name__.partition(".")[0], args)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        # Packed weights are oneDNN's own and have no storage to ask.
        holder: Any = tensor if tensor.is_mkldnn else tensor.untyped_storage()
        if tensor.device.type == "meta" or id(holder) in self._known:
            return
        size = tensor.numel() * tensor.element_size() if tensor.is_mkldnn else holder.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[id(holder)] = weakref.finalize(holder, self._forget, id(holder), size)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]

    def _note_collective(self, name: str, args: Any) -> None:
        kind = next((kind for kind in _TIMES if kind in name), None)
        if kind is None:
            return  # a barrier
        # The larger of what went in and what came out is the whole.
        whole = max(_bytes(argument) for argument in args)
        groups = [
            dist.ProcessGroup.unbox(a).size() for a in args if type(a).__name__ == "ScriptObject" and _is_group(a)
        ]
        ranks = groups[0] if groups else dist.get_world_size()
        self.sent[kind] += round(_TIMES[kind] * whole * (ranks - 1) / ranks)


def _bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


def _is_group(argument: Any) -> bool:
    return "ProcessGroup" in str(argument._type())
