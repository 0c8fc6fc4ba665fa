"""How an instruction becomes the text a model reads before it answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from distill.data.encoder import Encoder


@dataclass(frozen=True)
class Example:
    """One record of instruction data, in whichever of the accepted shapes it came."""

    id: str
    messages: list[dict[str, str]]
    """Chat turns before the response; a single user turn unless the record was a conversation."""
    outputs: list[str]
    """Reference responses, the first is trained on; empty for a prompt without one."""
    complete: bool = True
    """False when the response was cut at a length limit: it then gets no EOS."""
    answered: bool = False
    """The record had a place for responses, even if they are empty."""
    written_by: str = ""
    """The model that wrote the responses; empty for people, or when it is not known."""
    verbatim: bool = False
    """The prompt came ready-made in a `prompt` field and is not wrapped in the alpaca template."""
    instruction: str = ""
    input: str = field(default="")


class Malformed(ValueError):
    """A record that fits none of the accepted shapes; the message says why."""


def parse(record: Any, default_id: str) -> Example:
    """An `Example` from {instruction, input?, output}, {prompt, output} or {messages}; `output` a string or a list.

    Raises:
        Malformed: with the reason.
    """
    if not isinstance(record, dict):
        raise Malformed(f"a JSON object is needed, this is a {type(record).__name__}")
    common: dict[str, Any] = {
        "id": str(record.get("id", default_id)),
        "complete": _boolean(record, "complete"),
        "answered": "output" in record,
        "written_by": _text(record, "written_by", needed=False),
    }
    if "messages" in record:
        turns = _messages(record["messages"])
        answer = [turns.pop()["content"]] if turns[-1]["role"] == "assistant" else []
        if not turns:
            raise Malformed("'messages' has no turn before the response")
        # An `output` beside the conversation is a later answer to it, such as a teacher's: it wins.
        return Example(messages=turns, outputs=_outputs(record["output"]) if "output" in record else answer, **common)
    outputs = _outputs(record.get("output", []))
    # A record may carry both; the instruction is then the source, `prompt` its rendering in some template.
    if "instruction" in record:
        instruction, extra = _text(record, "instruction"), _text(record, "input", needed=False)
        content = f"{instruction}\n\n{extra}" if extra else instruction
        turns = [{"role": "user", "content": content}]
        return Example(messages=turns, outputs=outputs, instruction=instruction, input=extra, **common)
    if "prompt" in record:
        turns = [{"role": "user", "content": _text(record, "prompt")}]
        return Example(messages=turns, outputs=outputs, verbatim=True, **common)
    raise Malformed("needs 'instruction', 'prompt' or 'messages'")


def render(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt in the named template, with the tokenizer's own BOS and no EOS.

    Raises:
        Malformed: the conversation needs a chat template, or the tokenizer's refuses it.
    """
    (ids,) = render_all([example], template, Encoder(tokenizer))
    if isinstance(ids, Malformed):
        raise ids
    return ids


def render_all(examples: list[Example], template: str, encode: Encoder) -> list[list[int] | Malformed]:
    """As `render`, of many examples at once; in the place of a refused one stands why."""
    texts = prompt_texts(examples, template, encode.tokenizer)
    # Chat templates write BOS themselves.
    found = iter(encode([text for text in texts if isinstance(text, str)], special_tokens=template != "chat"))
    prompts = [next(found) if isinstance(text, str) else text for text in texts]
    if template == "chat":
        return prompts
    eos = encode.tokenizer.eos_token_id
    return [ids[:-1] if isinstance(ids, list) and ids and ids[-1] == eos else ids for ids in prompts]


def prompt_texts(examples: list[Example], template: str, tokenizer: PreTrainedTokenizerBase) -> list[str | Malformed]:
    """The prompts as text; in the place of a refused one stands why."""
    if template == "chat":
        return _chat(examples, tokenizer)
    return [
        Malformed(f"a conversation of {len(example.messages)} turns needs TEMPLATE=chat")
        if len(example.messages) > 1
        else _TEXT_TEMPLATES[template](example)
        for example in examples
    ]


# A template is a program, and any of its errors the record's: it may be right for others.
_OF_TEMPLATES = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _chat(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[str | Malformed]:
    if not examples:
        return []
    try:
        conversations = [example.messages for example in examples]
        return list(tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False))
    except _OF_TEMPLATES as error:
        if len(examples) == 1:
            return [Malformed(f"the tokenizer's chat template refuses it: {error}")]
        return [text for example in examples for text in _chat([example], tokenizer)]


def _plain(example: Example) -> str:
    content = example.messages[0]["content"]
    return content if example.verbatim else content + "\n\n"


def _alpaca(example: Example) -> str:
    if example.verbatim:
        return example.messages[0]["content"]
    instruction = example.instruction or example.messages[0]["content"]
    context = ", paired with an input that provides further context" if example.input else ""
    given = f"\n\n### Input:\n{example.input}" if example.input else ""
    return (
        f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}{given}\n\n### Response:\n"
    )


_TEXT_TEMPLATES: dict[str, Callable[[Example], str]] = {"plain": _plain, "alpaca": _alpaca}
TEMPLATES = ("chat", *sorted(_TEXT_TEMPLATES))


def _text(record: dict[str, Any], key: str, needed: bool = True) -> str:
    value = record.get(key) or ""
    if not isinstance(value, str):
        raise Malformed(f"'{key}' must be text, this is a {type(value).__name__}")
    if needed and not value.strip():
        raise Malformed(f"'{key}' is empty")
    return value


def _boolean(record: dict[str, Any], key: str) -> bool:
    value = record.get(key, True)
    if not isinstance(value, bool):
        raise Malformed(f"'{key}' must be true or false")
    return value


def _outputs(value: Any) -> list[str]:
    outputs = [value] if isinstance(value, str) else value
    if not isinstance(outputs, list) or not all(isinstance(item, str) for item in outputs):
        raise Malformed("'output' must be text or a list of texts")
    return [item for item in outputs if item.strip()]


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise Malformed("'messages' must be a list of turns")
    for turn in value:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise Malformed("each of 'messages' needs a 'role' and a 'content' of text")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
