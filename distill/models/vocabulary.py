"""Which ids teacher and student share, and which end a response."""

from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers import PreTrainedConfig as ModelConfig


def shared_vocabulary(tokenizer: PreTrainedTokenizerBase, *configs: ModelConfig) -> int:
    """Ids 0 … V−1 that every model has a row for and the tokenizer can write.

    Heads are often padded to a round number, and differently so; the rows past V are cut from both models' logits,
    which renormalises each over what exists.
    """
    return min([len(tokenizer), *(config.get_text_config().vocab_size for config in configs)])


def eos_ids(
    tokenizer: PreTrainedTokenizerBase, configs: Sequence[ModelConfig | GenerationConfig | None] = ()
) -> list[int]:
    """Ids that end a response: the tokenizer's EOS and those that the models' configurations name."""
    found = {tokenizer.eos_token_id}
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return sorted(index for index in found if index is not None)
