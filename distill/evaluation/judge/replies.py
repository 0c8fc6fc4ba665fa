"""A judge's replies, a line each, kept as soon as they are there: what was asked once is not asked, or paid, again."""

import fcntl
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.errors import BadInput, Problem
from distill.evaluation.judge.tasks import Task
from distill.evaluation.judge.verdicts import Verdict, read_verdict

_NO_FILE_NAME = re.compile(r"[^\w.-]+", re.ASCII)
_LONGEST_NAME = 100
_FIELD = "DIR"

GARBAGE = "no completion"
"""The `finish` of what is no reply at all, but a server's page or half an answer."""


@dataclass(frozen=True)
class Reply:
    """What a judge said to one question."""

    text: str
    finish: str | None
    """Why it ended, in the server's word: `stop`, or `length` where it was cut off."""
    prompt_tokens: int | None
    """None where the server does not say."""
    completion_tokens: int | None
    url: str
    """Without credentials."""
    retries: int
    """Failures before it."""


def replies_file(folder: Path, judge: str) -> Path:
    """In the folder of an evaluation. Judges whose names differ by a sign may share one: each line has its request's
    hash."""
    name = _NO_FILE_NAME.sub("_", judge)[:_LONGEST_NAME]
    return folder / "judge" / f"{name}.replies.jsonl"


class ReplyFile:
    """All replies of one judge to questions about one evaluation; a context in which nobody else writes there."""

    def __init__(self, path: Path):
        self.path = path
        self._replies: dict[str, list[Reply]] = defaultdict(list)
        self._lock = threading.Lock()

    def __enter__(self) -> "ReplyFile":
        """Read what is there; the end of a line that a kill has cut off is dropped.

        Raises:
            BadInput: another command writes to it, or it holds something else.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        except OSError as error:
            wrong = f"cannot be written ({error.strerror})"
            raise BadInput(Problem(_FIELD, str(self.path), wrong, "see to its rights")) from None
        try:
            self._hold()
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            os.truncate(self.path, whole)
            for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
                key, reply = _parsed(line, f"{self.path}:{number}")
                self._replies[key].append(reply)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What was never answered leaves nothing behind.
        with suppress(OSError):
            if not self._replies:
                self.path.unlink()
                self.path.parent.rmdir()
        self._file.close()

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(self._file.fileno()).st_nlink:
                raise BlockingIOError  # whoever held it has just taken it away
        except BlockingIOError:
            wrong = "another `distill judge` writes to it"
            raise BadInput(Problem(_FIELD, str(self.path), wrong, "wait for it, or end it")) from None
        except OSError:
            pass  # a filesystem without locks

    def of(self, task: Task) -> list[Reply]:
        """The replies to a question, in their order."""
        return list(self._replies.get(task.key, []))

    def verdict(self, task: Task) -> Verdict | None:
        """Of the first reply that holds one."""
        replies = [reply for reply in self._replies.get(task.key, []) if reply.finish != GARBAGE]
        verdicts = (read_verdict(task.place.mode, reply.text) for reply in replies)
        return next((verdict for verdict in verdicts if verdict is not None), None)

    def add(self, task: Task, reply: Reply) -> None:
        """Keep a reply: in the file before anything else happens. For threads."""
        line = {"key": task.key, "about": asdict(task.place), "reply": asdict(reply)}
        with self._lock:
            self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            self._file.flush()
            self._replies[task.key].append(reply)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that one process enters at a time, where the filesystem knows locks."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _parsed(line: bytes, where: str) -> tuple[str, Reply]:
    try:
        content: Any = json.loads(line)
        reply = Reply(**content["reply"])
        if not (isinstance(reply.text, str) and isinstance(content["key"], str)):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        raise BadInput(Problem(_FIELD, where, "is no judge's reply", "remove the line")) from None
    return content["key"], reply
