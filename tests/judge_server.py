"""An endpoint that speaks the chat protocol and fails as it is told, and the folder of an evaluation to judge."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from distill.evaluation.questions import Question, questions_file, write_questions

FIRST = '{"reason": "it stands first", "better": 1}'
SIX_OF_TEN = '{"points_1": 6, "points_2": 10}'


@dataclass
class Answer:
    """What the server does with one request."""

    text: str = ""
    """The reply's, of a chat completion."""
    status: int = 200
    raw: bytes | None = None
    """In place of a chat completion."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    finish: str = "stop"

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "type": "x"}}).encode()
        message = {"role": "assistant", "content": self.text}
        choices = [{"index": 0, "message": message, "finish_reason": self.finish}]
        return json.dumps({"object": "chat.completion", "choices": choices, "usage": self.usage}).encode()


@dataclass
class Endpoint:
    """Requests so far, the moments at which they came, and how many were at work at once."""

    port: int
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


@contextmanager
def endpoint(answer: Callable[[str, int], Answer]) -> Iterator[Endpoint]:
    """A server that gives `answer(prompt, place of the request)`."""
    lock, at_work = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.bodies)
                seen.bodies.append(body)
                seen.headers.append({name.lower(): value for name, value in self.headers.items()})
                seen.times.append(time.monotonic())
                at_work[0] += 1
                seen.most_at_once = max(seen.most_at_once, at_work[0])
            given = answer(body["messages"][0]["content"], number)
            time.sleep(given.delay)
            content = given.body()
            with lock:
                at_work[0] -= 1
            self.send_response(given.status)
            for name, value in ({"Content-Type": "application/json"} | given.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that has given up

    with Server(("127.0.0.1", 0), Handler) as server:
        seen = Endpoint(server.server_port)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()


def evaluated(
    folder: Path,
    models: Sequence[str] = ("a", "b"),
    rows: int = 4,
    seeds: Sequence[int] = (10,),
    references: bool = True,
) -> Path:
    """A folder as `distill evaluate` leaves it, of the set `held-out`, as far as a judge reads it."""
    questions = [Question(f"Question {row}?", [f"Reference {row}."] if references else []) for row in range(rows)]
    write_questions(questions_file(folder, "held-out"), questions)
    for model in models:
        (folder / model).mkdir()
        for seed in seeds:
            lines: list[dict[str, Any]] = [{"model": f"weights of {model}"}]
            lines += [
                {"row": row, "text": f"Response of {model} to {row}, {seed}.", "ids": [1], "ended": True}
                for row in range(rows)
            ]
            content = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / model / f"held-out.seed-{seed}.jsonl").write_text(content)
    suite = {"sets": {"held-out": "x.jsonl"}, "choices": {}, "texts": {}, "seeds": list(seeds), "resamples": 200}
    about = {model: {"path": model, "weights": f"weights of {model}"} for model in models}
    (folder / "evaluation.json").write_text(json.dumps({"suite": suite, "models": about, "figures": {}}))
    return folder
