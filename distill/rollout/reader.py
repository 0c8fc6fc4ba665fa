"""One model reading along: its cache, and how far it has read. Every token passes through it once."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from distill.data.batches import TokenBatch
from distill.models.heads import hidden_states
from distill.rollout.cache import preallocated_cache


class Reader:
    """Reads the prompts, then response tokens as they come, for rows that may leave."""

    def __init__(self, model: PreTrainedModel, prompts: TokenBatch, limit: int):
        self.model = model
        self.calls = 0
        self._width = prompts.prompt_ids.shape[1]
        self._prompt_ids, self._prompt_lengths = prompts.prompt_ids, prompts.prompt_lengths
        self._cache = preallocated_cache(model.config, self._width + limit)
        prompt_mask = prompts.model_inputs()["attention_mask"][:, : self._width]
        self._mask = torch.cat([prompt_mask, prompt_mask.new_ones((len(prompts), limit))], 1)
        self._seen = 0

    def read(self, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch read hidden"]:
        """Forward new response tokens; the first call reads the prompt before them.

        Returns a final hidden state for each new token, before them on the first call the prompt's last one.
        """
        first = self._seen == 0
        ids = torch.cat([self._prompt_ids, tokens], 1) if first else tokens
        columns = torch.arange(self._seen, self._seen + ids.shape[1], device=ids.device)
        # Left padding takes no position; its own is arbitrary, the mask hides it.
        positions = (columns - self._width + self._prompt_lengths[:, None]).clamp_min(0)
        self._seen += ids.shape[1]
        self.calls += 1
        hidden = hidden_states(self.model, ids, self._mask[:, : self._seen], positions, self._cache)
        return hidden[:, -(tokens.shape[1] + first) :]

    def idle(self) -> None:
        """A forward of one token that nothing comes of: other ranks need this one's shards."""
        token = self._prompt_ids[:1, -1:]
        hidden_states(self.model, token, torch.ones_like(token), torch.zeros_like(token))

    def keep(self, index: Int[Tensor, " kept"]) -> None:
        """Go on with these of the rows."""
        self._prompt_ids, self._prompt_lengths = self._prompt_ids[index], self._prompt_lengths[index]
        self._mask = self._mask[index]
        self._cache.batch_select_indices(index)
