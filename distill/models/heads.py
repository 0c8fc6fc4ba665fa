"""From final hidden states to logits, as each architecture does it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from distill.errors import BadInput, Problem
from distill.models.vocab_shard import WHOLE, VocabShard
from distill.topology import Topology

_PROBE_TOKENS = 8
# The largest component of the amplified hidden states: logits far beyond any soft cap, within fp16.
_LOUD = 1000.0
# bf16 rounds the head's product, its scale and its cap by 0.4 % each.
_TOLERANCE = 0.02


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


def vocab_shard(model: PreTrainedModel, vocab: int) -> VocabShard:
    """Which of the first `vocab` ids this rank's head makes logits of: all, unless tensor parallelism deals them out.

    Raises:
        BadInput: some rank would have none.
    """
    head: Any = model.get_output_embeddings()
    if not getattr(head, "is_vocab_parallel_lm_head", False):
        return WHOLE
    # DeepSpeed deals out the head's rows, padding included. Private there, and nowhere else to be had.
    starts = list(accumulate(head._partition_sizes, initial=0))
    widths = tuple(min(stop, vocab) - start for start, stop in pairwise(starts))
    if min(widths) < 1:
        wrong = f"of {head.vocab_size} rows only {vocab} are tokens, the last of {len(widths)} ranks would have none"
        raise BadInput(Problem("parallel.teacher_tp", len(widths), wrong, "lower it"))
    return VocabShard(widths, head.tp_index, head.mp_group)


def project(model: PreTrainedModel, hidden: Float[Tensor, "... hidden"], vocab: int) -> Float[Tensor, "... vocab"]:
    """Logits over the first `vocab` ids; where they are dealt out, every rank of the group brings the same tokens."""
    return vocab_shard(model, vocab).gather(project_own(model, hidden, vocab))


def project_own(model: PreTrainedModel, hidden: Float[Tensor, "... hidden"], vocab: int) -> Float[Tensor, "... local"]:
    """Logits over those of the first `vocab` ids that are this rank's.

    The head's weight must be gathered. Its class's `forward` is called directly: ZeRO-3's hooks, which would fetch and
    release the weight, belong to the module's `__call__`.
    """
    head, start = model.get_output_embeddings(), vocab_shard(model, vocab).start
    return Finish.of(model).logits(type(head).forward(head, hidden)[..., : vocab - start])


@torch.no_grad()
def check_head(
    model: PreTrainedModel, path: str, vocab: int, topology: Topology, head_gathered: AbstractContextManager[None]
) -> None:
    """Compare `project_own` with the model's own forward of a few tokens. Collective where the weights are sharded.

    Raises:
        BadInput: the logits differ, or are not numbers; `path` is the model's.
    """
    ids = torch.arange(_PROBE_TOKENS, device=topology.device).remainder(vocab)
    states, own = _quiet_and_loud(model, ids)
    with head_gathered:
        ours = project_own(model, states, vocab).float()
    own = own[..., : ours.shape[-1]].float()
    if topology.max_over_ranks(float(own[0].isnan().any())):
        raise BadInput(Problem("model", path, "its logits are not numbers", "look for NaN in the weights"))
    errors = [float((z - u).norm() / z.norm()) for z, u in zip(own, ours, strict=True)]
    # Ranks that share the head look at different ids: all must come to the same verdict. A NaN is an error too.
    error = topology.max_over_ranks(max(error if error == error else torch.inf for error in errors))
    if not error < _TOLERANCE:
        wrong = f"{type(model).__name__} makes other logits than its head and config say, off by {error:.0%}"
        mend = "choose a model of another family, or teach this one's way to `Finish` in distill/models/heads.py"
        raise BadInput(Problem("model", path, wrong, mend))


def _quiet_and_loud(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, "2 tokens hidden"], Float[Tensor, "2 tokens rows"]]:
    """Final hidden states and the model's own logits of them: as they are, where an offset shows, and amplified, where
    a soft cap does."""
    kept: list[Tensor] = []

    def amplify_second(_module: object, _inputs: object, output: Any) -> None:
        states = output.last_hidden_state[0]
        output.last_hidden_state = torch.stack([states, states * (_LOUD / states.abs().max())])
        kept.append(output.last_hidden_state)

    training = model.training
    model.eval()  # dropout would draw from the run's random numbers
    # Within the base model, which some (OPT) pass by on the way from their decoder to the head.
    handle = model.get_decoder().register_forward_hook(amplify_second)
    twice = ids.expand(2, -1)
    try:
        logits = model(input_ids=twice, attention_mask=torch.ones_like(twice), use_cache=False).logits
    finally:
        handle.remove()
        model.train(training)
    return kept[0], logits
