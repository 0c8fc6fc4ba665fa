"""Tensors as a safetensors file, a tensor at a time: the library's own `save` holds the whole file in memory twice."""

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.checkpoint.disk import HashedFile
from distill.whereabouts import here

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all tensors: nearly those of the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def serialise(content: TensorFile, file: HashedFile) -> None:
    """Write `content` in the safetensors format: the header's length, the header, the tensors without gaps."""
    # Wide types first: then every tensor begins where its type may.
    tensors = sorted(content.tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": content.metadata} if content.metadata else {}
    at = 0
    for name, tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for chunk in data.split(_CHUNK_BYTES):
            file.write(chunk.cpu().numpy().data)
            here.tick()
