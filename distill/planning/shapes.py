"""A model's sizes from its config alone: parameters, keys and values, what a layer keeps for its backward.

The model is built on the meta device, which has shapes and no memory, so any architecture is counted exactly.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedConfig as ModelConfig

from distill.config import ModelSettings
from distill.models.loading import load_config

# Tokens and layers of the forwards that are traced; what a layer keeps grows with both in proportion.
_TOKENS, _LAYERS = 32, 2
_ATTENTION = "planned"


@dataclass(frozen=True)
class ModelShape:
    """Numbers of parameters and sizes, of the whole model; a tied head counts once, as the embedding."""

    parameters: int
    matrices: int
    """Of the layers' linear maps, which tensor parallelism splits."""
    embedding: int
    head: int
    """Of the lm_head; 0 where it is tied to the embedding."""
    sizes: tuple[tuple[int, bool], ...]
    """Of each parameter, and whether tensor parallelism splits it."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    linears: int
    """Linear maps of all layers."""
    kv_width: int
    """Numbers that one token adds to the cache, keys and values of all layers."""
    tp: int = 1
    """Ranks that split its matrices between them."""

    @property
    def on_rank(self) -> float:
        """Parameters that one tensor-parallel rank needs, ZeRO apart."""
        return self.split / self.tp + self.replicated

    @property
    def kv_on_rank(self) -> float:
        """Of `kv_width`, where heads go around unevenly on the rank with most."""
        return self.kv_width / self.kv_heads * -(-self.kv_heads // self.tp)

    @property
    def replicated(self) -> int:
        """Parameters that every tensor-parallel rank has: vectors, position tables, an embedding of its own."""
        return self.parameters - self.split

    @property
    def split(self) -> int:
        """Parameters that tensor parallelism splits: a tied embedding goes with the head."""
        return self.matrices + (self.head or self.embedding)

    @property
    def head_size(self) -> int:
        """Of the matrix that makes logits, tied or not."""
        return self.head or self.embedding

    def whole_below(self, threshold: int) -> tuple[float, float]:
        """Parameters in tensors of at most `threshold` numbers on a tensor-parallel rank, which ZeRO-3 keeps whole:
        of those that are split, a rank's part, and of the others."""
        parts = [(size / self.tp if split else size, split) for size, split in self.sizes]
        small = [(size, split) for size, split in parts if size <= threshold]
        return sum(size for size, split in small if split), sum(size for size, split in small if not split)


@dataclass(frozen=True)
class Saved:
    """Bytes a token that one tensor-parallel rank keeps between forward and backward."""

    layer: float
    """In each layer."""
    checkpointed_layer: float
    """In each layer, where activations are recomputed."""
    rest: float
    """Outside the layers."""


@lru_cache
def read_shape(settings: ModelSettings, field: str) -> ModelShape:
    """The sizes of the model at `settings.path`.

    Raises:
        BadInput: no readable config there; names the setting `field`.
    """
    config = load_config(settings, field)
    model = _on_meta(config, torch.float32)
    text = config.get_text_config()
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight
    own = {id(embedding), id(head)}
    looked_up = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in own | looked_up]
    split = {id(p) for p in matrices} | {id(head)}
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        parameters=sum(p.numel() for p in parameters),
        matrices=sum(p.numel() for p in matrices),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        sizes=tuple((p.numel(), id(p) in split) for p in parameters),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        vocab=len(head),
        linears=len(matrices),
        kv_width=text.num_hidden_layers * 2 * kv_heads * width,
    )


@lru_cache
def read_saved(settings: ModelSettings, field: str, dtype: torch.dtype, tp: int) -> Saved:
    """What the model keeps for its backward, traced on the meta device with a `tp`-th of its heads and inner width.

    Fused attention keeps queries, keys, values, its output and one fp32 number a head and token (arXiv 2205.14135).
    """
    config = _shard(load_config(settings, field), tp)
    few, more = (_saved_bytes(config, layers, dtype, False) for layers in (_LAYERS, 2 * _LAYERS))
    few_again, more_again = (_saved_bytes(config, layers, dtype, True) for layers in (_LAYERS, 2 * _LAYERS))
    layer = (more - few) / _LAYERS
    return Saved(
        layer / _TOKENS,
        (more_again - few_again) / _LAYERS / _TOKENS,
        max(few - _LAYERS * layer, 0) / _TOKENS,
    )


def _on_meta(config: ModelConfig, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **how)


def _shard(config: ModelConfig, tp: int) -> ModelConfig:
    """The config of a model as wide inside as one tensor-parallel rank's part."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "ffn_dim"):
        if getattr(text, name, None):
            setattr(text, name, -(-getattr(text, name) // tp))
    return config


def _saved_bytes(config: ModelConfig, layers: int, dtype: torch.dtype, checkpointing: bool) -> int:
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model = _on_meta(config, dtype, attn_implementation=_ATTENTION).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    with _counting(model) as seen:
        # Bound to a name: what it keeps must live until it is counted.
        output = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    del output
    return sum(storage.nbytes() for storage in seen.values())


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that autograd keeps, the model's own left out."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield seen


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **how: Any) -> Any:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, lambda *given, **how: None)
