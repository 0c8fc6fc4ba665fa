"""From final hidden states to logits, as each architecture does it."""

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
    cache: Cache,
) -> Float[Tensor, "batch tokens hidden"]:
    """Final hidden states of new tokens, whose keys and values are added to `cache`. No logits are made."""
    output = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state


def project(model: PreTrainedModel, hidden: Float[Tensor, "... hidden"], vocab: int) -> Float[Tensor, "... vocab"]:
    """Logits over the first `vocab` ids, with the architecture's own scaling and soft cap.

    The head's weight must be whole. Its `forward` is called directly: ZeRO-3's hooks, which would fetch and release
    the weight, belong to the module's `__call__`.
    """
    head = model.get_output_embeddings()
    logits = head.forward(hidden)[..., :vocab]
    config = model.config
    if getattr(config, "logits_scaling", None):  # Granite divides …
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # … Cohere multiplies
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits
