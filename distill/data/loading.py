"""Records → `TokenBatch`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distill.data.batches import TokenBatch, pad_rows
from distill.data.records import open_records, read_manifest


class InstructionRecords:
    """Prompts with tokenised responses and reference texts."""

    def __init__(self, folder: Path, field: str):
        self.rows = open_records(folder, "instructions", field)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """The records as one batch; a record without a response gets an empty one."""
        return token_batch([self.rows[index] for index in indices])

    def references(self, indices: Sequence[int]) -> list[list[str]]:
        """Reference texts of each record."""
        return [list(self.rows[index]["references"]) for index in indices]

    def prompts(self, indices: Sequence[int]) -> list[str]:
        """Prompt texts, as a person wrote them (no template)."""
        return [self.rows[index]["prompt"] for index in indices]


class TextRecords:
    """Packed plain text: every record is one chunk without padding."""

    def __init__(self, folder: Path, field: str):
        self.rows = open_records(folder, "text", field)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """Chunks as batches whose one-token prompt is the first token: the rest is predicted."""
        chunks = [self.rows[index]["input_ids"] for index in indices]
        return token_batch([{"prompt_ids": chunk[:1], "response_ids": chunk[1:]} for chunk in chunks])


def open_plain_text(folder: Path, field: str) -> TextRecords | InstructionRecords:
    """What L_PT reads: packed text, or instruction records, of which the responses are predicted.

    Raises:
        BadInput: not a folder of records.
    """
    text = read_manifest(folder, field).kind == "text"
    return TextRecords(folder, field) if text else InstructionRecords(folder, field)


def token_batch(rows: Sequence[dict[str, Any]]) -> TokenBatch:
    """Pad rows of `prompt_ids` and `response_ids` into one batch (int64)."""
    prompts = [torch.tensor(row["prompt_ids"], dtype=torch.long) for row in rows]
    responses = [torch.tensor(row["response_ids"], dtype=torch.long) for row in rows]
    return TokenBatch(
        prompt_ids=pad_rows(prompts, max(map(len, prompts)), left=True),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        response_ids=pad_rows(responses, max(map(len, responses))),
        response_lengths=torch.tensor([len(response) for response in responses]),
    )
