"""Who is asked, how, and how fast: from the command line, checked before anything is asked."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from distill.errors import BadInput, Problem

_OURS = ("model", "messages", "stream", "n")
LIMITS = ("max_tokens", "max_completion_tokens")
"""Either bounds a reply, and so what it may cost."""
# A shorter one is no secret, and would be found in any text.
_SHORTEST_KEY = 8


@dataclass(frozen=True)
class Prices:
    """Of a million tokens."""

    prompt: float
    completion: float

    def of(self, prompt: int, completion: int) -> float:
        """What so many tokens cost."""
        return (prompt * self.prompt + completion * self.completion) / 1e6


@dataclass(frozen=True)
class Judge:
    """An OpenAI-compatible chat endpoint and a model there."""

    url: str
    """Up to what `/chat/completions` is added to; it may hold credentials."""
    model: str
    key: str = field(repr=False)
    options: Mapping[str, Any]
    """Fields of each request, besides the model and the messages."""
    timeout: float = 120.0
    """Seconds of silence after which a request is given up."""
    max_retries: int = 5
    """Of a request that got no reply, or 408, 409, 429 or 5xx."""

    @property
    def public_url(self) -> str:
        """Without credentials."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @property
    def longest_reply(self) -> int | None:
        """Tokens that the request allows; None if it does not say."""
        return next((self.options[name] for name in LIMITS if name in self.options), None)

    def clean(self, text: str) -> str:
        """Without the key, should a server send it back."""
        return text.replace(self.key, "***") if len(self.key) >= _SHORTEST_KEY else text


@dataclass(frozen=True)
class Manners:
    """How hard the judge is pressed, and what it may cost."""

    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    asks: int = 3
    """Times at most that one question is put, until the reply holds a verdict."""
    prices: Prices | None = None
    max_cost: float | None = None
    """Of one command."""


def check_url(url: str) -> str:
    """`url`, if requests can be sent there.

    Raises:
        BadInput: they cannot.
    """
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise BadInput(Problem("--judge-url", url, "is no http address", "e.g. http://localhost:8000/v1"))
    if parts.query or parts.fragment:
        raise BadInput(Problem("--judge-url", url, "has a part after ? or #", "give the address before it"))
    return url


def read_key(variable: str) -> str:
    """The key that the environment holds.

    Raises:
        BadInput: there is none.
    """
    if not variable.isidentifier():  # perhaps the key itself
        raise BadInput(Problem("--key-variable", variable, "is no name of a variable", "e.g. OPENAI_API_KEY"))
    key = os.environ.get(variable, "").strip()
    if not key:
        mend = "export it, or name another with --key-variable; a server that asks for none takes any text"
        raise BadInput(Problem(variable, None, "is not set in the environment", mend))
    if not (key.isascii() and key.isprintable()):
        raise BadInput(Problem(variable, "***", "holds what no header can carry", "see what it was set to"))
    return key


def read_options(given: Sequence[str], max_tokens: int, seed: int) -> dict[str, Any]:
    """Fields of a request: ours, changed by `name=value`; null takes one out. A value that is no JSON is a text.

    Raises:
        BadInput: one that is not of that form, or not to be changed.
    """
    options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "seed": seed}
    for item in given:
        name, equals, text = item.partition("=")
        if not (name and equals):
            raise BadInput(Problem("--option", item, "not of the form name=value", "e.g. reasoning_effort=low"))
        if name in _OURS:
            raise BadInput(Problem("--option", item, f"{name} is not to be changed", "leave it out"))
        options[name] = _value(text)
    options = {name: value for name, value in options.items() if value is not None}
    for name in LIMITS:
        value = options.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(Problem("--option", f"{name}={value}", "is no number of tokens", "give one of 1 or more"))
    return options


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value


def check_costs(judge: Judge, manners: Manners) -> None:
    """See that a limit of costs can be kept.

    Raises:
        BadInput: prices or a bound on replies are missing.
    """
    if manners.max_cost is None:
        return
    if manners.prices is None:
        wrong = "nothing says what tokens cost"
        raise BadInput(Problem("--max-cost", manners.max_cost, wrong, "give --price-in and --price-out"))
    if judge.longest_reply is None:
        wrong = "a reply may be of any length"
        raise BadInput(Problem("--max-cost", manners.max_cost, wrong, f"give --option {LIMITS[1]}=1000, or so"))
