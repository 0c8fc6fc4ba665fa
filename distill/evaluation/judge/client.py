"""Requests over HTTP: what comes back is a reply, or says why there is none."""

import json
from typing import Any

from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    DefaultHttpxClient,
    NotFoundError,
    OpenAI,
    PermissionDeniedError,
    RateLimitError,
)

from distill.errors import BadInput, Problem, Unreachable
from distill.evaluation.judge.limits import Pace
from distill.evaluation.judge.replies import GARBAGE, Reply
from distill.evaluation.judge.settings import Judge

# Of what a server says in place of a reply, and of a reply.
_LONGEST_ERROR, _LONGEST_REPLY = 300, 2**16
_GO_ON = "the same command goes on"


class Refused(Exception):
    """Raised where the server will not have this one request, such as for its length; others may pass."""


class Client:
    """Asks a judge. Failures that may pass are tried again after pauses that double; every try waits for `pace`."""

    def __init__(self, judge: Judge, pace: Pace):
        self.judge = judge
        self._answered = False
        http = DefaultHttpxClient(event_hooks={"request": [lambda request: pace.take()]})
        self._client = OpenAI(
            api_key=judge.key,
            base_url=judge.url,
            timeout=judge.timeout,
            max_retries=judge.max_retries,
            http_client=http,
        )

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def ask(self, body: dict[str, Any]) -> Reply:
        """One chat completion. For threads.

        Raises:
            Refused: the server will not have this request.
            Unreachable: it does not answer, or is overloaded, for all retries.
            BadInput: it knows neither key, address nor model, or was never there.
        """
        fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=fields
            )
        except APIConnectionError as error:
            raise self._silence(error) from None
        except APIStatusError as error:
            raise self._rejection(error) from None
        return self._reply(raw.http_response.text, raw.retries_taken)

    def _reply(self, content: str, retries: int) -> Reply:
        url = self.judge.public_url
        try:
            completion = json.loads(content)
            choice = completion["choices"][0]
            text = choice["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if not self._answered:
                wrong = f"sends no chat completion, but {self._said(content)!r}"
                raise BadInput(Problem("--judge-url", url, wrong, "most addresses end in /v1")) from None
            return Reply(self._said(content), GARBAGE, None, None, url, retries)
        self._answered = True
        usage = completion.get("usage")
        tokens = [_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
        finish = choice.get("finish_reason")
        # A judge that only calls tools, or spends all tokens on thoughts, says nothing.
        text = self.judge.clean(text if isinstance(text, str) else "")[:_LONGEST_REPLY]
        return Reply(text, finish if isinstance(finish, str) else None, tokens[0], tokens[1], url, retries)

    def _silence(self, error: APIConnectionError) -> BadInput:
        url, tries = self.judge.public_url, self.judge.max_retries + 1
        if isinstance(error, APITimeoutError):
            wrong = f"was silent for {self.judge.timeout:g} s, {tries} times"
            return Unreachable(Problem("--judge-url", url, wrong, f"raise --judge-timeout; {_GO_ON}"))
        wrong = f"cannot be reached ({self._said(str(error.__cause__ or error))})"
        mend = "start the server there, or correct the address"
        if self._answered:
            return Unreachable(Problem("--judge-url", url, wrong, f"{mend}; {_GO_ON}"))
        return BadInput(Problem("--judge-url", url, wrong, mend))

    def _rejection(self, error: APIStatusError) -> Exception:
        url, said = self.judge.public_url, f"{error.status_code}: {self._said(_message(error))}"
        if isinstance(error, (AuthenticationError, PermissionDeniedError)):
            return BadInput(Problem("--judge-url", url, f"refuses the key ({said})", "see --key-variable"))
        if isinstance(error, NotFoundError):
            wrong = f"has no chat completions, or no such model ({said})"
            mend = f"see --judge-model {self.judge.model}; most addresses end in /v1"
            return BadInput(Problem("--judge-url", url, wrong, mend))
        if isinstance(error, RateLimitError) or error.status_code >= 500 or error.status_code in (408, 409):
            wrong = f"fails ({said}), {self.judge.max_retries + 1} times"
            mend = f"ask more slowly (--requests-per-minute), or later; {_GO_ON}"
            return Unreachable(Problem("--judge-url", url, wrong, mend))
        return Refused(said)

    def _said(self, text: str) -> str:
        return self.judge.clean(text)[:_LONGEST_ERROR]


def _message(error: APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return message if isinstance(message, str) else error.response.text


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
