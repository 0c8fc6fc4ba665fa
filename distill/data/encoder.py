"""Token ids of many texts at once."""

import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.data.records import fingerprint

_PROBE = ["The 2 quick brown foxes don't jump.\n\n\tnaïve 日本", " a  b ", "x" * 600]


class Encoder:
    """`tokenizer.encode` for lists of texts, without what only models and offsets need.

    A tokenizer written in Rust is asked directly, if it gives the same ids that way on a probe.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._rust: Any = None
        if tokenizer.is_fast:
            # This first call also switches off the truncation and padding that a tokenizer.json may ask for.
            expected = [tokenizer.encode(text) for text in _PROBE]
            found = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(_PROBE)]
            self._rust = tokenizer.backend_tokenizer if found == expected else None

    def __call__(self, texts: list[str], special_tokens: bool = False) -> list[list[int]]:
        """Each text's ids, with what the tokenizer itself adds (such as BOS) if `special_tokens`."""
        if not texts:
            return []
        if self._rust is not None:
            encodings = self._rust.encode_batch_fast(texts, add_special_tokens=special_tokens)
            return [encoding.ids for encoding in encodings]
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=special_tokens)["input_ids"]
        return found


def content_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides the ids of a record, the chat template too."""
    tokenizer.encode("")  # from now on without the truncation and padding that a tokenizer.json may ask for
    content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else fingerprint(tokenizer)
    settings = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(f"{settings}{content}".encode()).hexdigest()[:16]
