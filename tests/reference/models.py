"""A causal language model of transformers in fp64, read one sequence at a time: no padding, no cache, no batch."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Model:
    """Reads whole sequences. Only the first `vocab` logits count."""

    def __init__(self, path: str, vocab: int, dtype: torch.dtype = torch.float64):
        self.net = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
        self.vocab = vocab

    def next_logits(self, ids: list[int]) -> Tensor:
        """Logits [vocab] of the token after `ids`."""
        with torch.no_grad():
            return self.net(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, : self.vocab].double()

    def response_logits(self, prompt: list[int], response: list[int]) -> Tensor:
        """Logits [len(response), vocab] that predict each token of the response; differentiable."""
        logits = self.net(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        return logits[len(prompt) - 1 : -1, : self.vocab].double()

    def parameters(self) -> dict[str, Tensor]:
        """The weights by name; a tied one stands once."""
        return dict(self.net.named_parameters())
