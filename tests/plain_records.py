"""Preprocessing once more: one loop over the lines of `a.jsonl`, `b.jsonl` and `c.txt`, and calls of the tokenizer.

Prompts have at most 200 tokens, records 300.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from known_answers import ALPACA, ALPACA_WITH_INPUT
from transformers import PreTrainedTokenizerBase

# What a plain loop has to treat apart: shapes, several references, ends, what is too long, and what is empty.
ODD: list[dict[str, Any]] = [
    {"id": "own", "instruction": "Name one.", "input": "A fruit.", "output": ["An apple.", "", "A pear."]},
    {"prompt": "Ready-made and verbatim:", "output": "Yes.", "written_by": "some model"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {"instruction": "Cut.", "output": "off at a limit", "complete": False},
    {"instruction": "word " * 150, "output": "a prompt of more than MAX_PROMPT tokens"},
    {"instruction": "Talk.", "output": "word " * 300},
    {"instruction": "Talk, and be cut.", "output": "word " * 300, "complete": False},
    {"instruction": "Say nothing.", "output": " "},
    {"instruction": "Nobody has answered."},
]


def at_the_limits(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Alpaca prompts of 200 tokens, which is allowed, and of 201, and a record of 300, of which nothing is cut."""
    used = len(tokenizer.encode(ALPACA.format("Go."))) + 1  # BOS
    found = [{"instruction": "Go." + " a" * (tokens - used), "output": "x"} for tokens in (200, 201)]
    return [*found, {"instruction": "Go.", "output": "a" + " a" * (300 - used - 2)}]


def plain_records(raw: Path, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[dict], Counter[str]]:
    """The instruction records by one loop over the lines, and what became of these."""
    found, counts = [], Counter[str]()
    for path in (raw / "a.jsonl", raw / "b.jsonl"):
        for number, line in enumerate(path.read_text().split("\n"), 1):
            if not line:
                continue
            counts["read"] += 1
            record = json.loads(line)
            turns = record.get("messages", [])[:1] or [{"role": "user", "content": record.get("prompt")}]
            outputs = record.get("output", [turn["content"] for turn in record.get("messages", [])[1:]])
            outputs = [text for text in ([outputs] if isinstance(outputs, str) else outputs) if text.strip()]
            text = turns[0]["content"]
            if "instruction" in record:
                instruction, extra = record["instruction"], record.get("input")
                turns[0]["content"] = f"{instruction}\n\n{extra}" if extra else instruction
                text = ALPACA_WITH_INPUT.format(instruction, extra) if extra else ALPACA.format(instruction)
            elif "messages" in record:
                text = ALPACA.format(text)
            if template == "chat":
                prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            else:
                prompt = tokenizer(text)["input_ids"][:-1]  # a prompt goes on: it has BOS, and no EOS
            if len(prompt) > 200:
                counts["dropped: prompt longer than MAX_PROMPT"] += 1
                continue
            if "output" in record and not outputs:
                counts["dropped: empty response"] += 1
                continue
            response = tokenizer(outputs[0], add_special_tokens=False)["input_ids"] if outputs else []
            if outputs and record.get("complete", True):
                response.append(tokenizer.eos_token_id)
            counts["kept"] += 1
            counts["kept: without a response"] += not outputs
            counts["kept: response cut at MAX_LENGTH"] += len(prompt) + len(response) > 300
            counts["kept: written by a model"] += "written_by" in record
            found.append(
                {
                    "id": record.get("id", f"{path}:{number}"),
                    "prompt": turns[0]["content"],
                    "references": outputs,
                    "prompt_ids": prompt,
                    "response_ids": response[: 300 - len(prompt)],
                }
            )
    return found, counts


def plain_rows(raw: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict], Counter[str]]:
    """Packed text: all tokens one after the other, EOS behind each document of jsonl, in rows of 300."""
    stream: list[int] = []
    for path in (raw / "a.jsonl", raw / "b.jsonl"):
        for line in path.read_text().split("\n"):
            if line:
                stream += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
                stream.append(tokenizer.eos_token_id)
    for line in (raw / "c.txt").read_text().splitlines(keepends=True):
        if line.strip():
            stream += tokenizer(line, add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": stream[at : at + 300]} for at in range(0, len(stream) - 299, 300)]
    rest = {"dropped: tokens of the last, incomplete chunk": len(stream) % 300}
    return rows, Counter({"kept": len(rows), "tokens read": len(stream)} | rest)
