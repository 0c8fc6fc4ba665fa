"""From final hidden states to logits, as each architecture does it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


def hidden_states(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch context"],
    position_ids: Int[Tensor, "batch tokens"],
    cache: Cache | None = None,
) -> Float[Tensor, "batch tokens hidden"]:
    """Final hidden states of new tokens, whose keys and values are added to `cache` if there is one. No logits."""
    output = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state


@dataclass(frozen=True)
class Finish:
    """What an architecture does to the head's product: times `scale`, then a soft cap z = cap·tanh(u/cap)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Finish":
        """As the model's config says: Granite divides, Cohere multiplies, Gemma caps."""
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, product: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """z of u = `product`."""
        if self.scale != 1:
            product = product * self.scale
        return torch.tanh(product / self.cap) * self.cap if self.cap else product

    def pull_back(
        self, gradient: Float[Tensor, "... vocab"], logits: Float[Tensor, "... vocab"]
    ) -> Float[Tensor, "... vocab"]:
        """∂/∂product from ∂/∂logits: dz/du = scale · (1 − (z/cap)²)."""
        if self.cap:
            gradient = gradient * (1 - (logits.to(gradient.dtype) / self.cap).square())
        return gradient * self.scale if self.scale != 1 else gradient


def project(model: PreTrainedModel, hidden: Float[Tensor, "... hidden"], vocab: int) -> Float[Tensor, "... vocab"]:
    """Logits over the first `vocab` ids.

    The head's weight must be whole. Its class's `forward` is called directly: ZeRO-3's hooks, which would fetch and
    release the weight, belong to the module's `__call__`.
    """
    head = model.get_output_embeddings()
    return Finish.of(model).logits(type(head).forward(head, hidden)[..., :vocab])
