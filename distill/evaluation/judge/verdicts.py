"""What a judge's reply says: points of the two responses, or nothing that can be read."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from distill.evaluation.judge.prompts import Mode

Verdict = tuple[float, float]
"""Points of the response that stood first and of the other: 1 to 10 each, or of a pair 1 in all."""

_LEAST, _MOST = 1, 10
_BETTER: dict[str, Verdict] = {"1": (1.0, 0.0), "2": (0.0, 1.0), "tie": (0.5, 0.5)}


def read_verdict(mode: Mode, reply: str) -> Verdict | None:
    """The verdict in a reply, whatever text stands around it; None if there is none, or two that differ."""
    found = {verdict for content in _objects(reply) if (verdict := _READ[mode](content)) is not None}
    return found.pop() if len(found) == 1 else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """All JSON objects in a text, those within others too."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):
            pass
        start = text.find("{", start + 1)


def _points(content: dict[str, Any]) -> Verdict | None:
    points = [content.get(name) for name in ("points_1", "points_2")]
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in points):
        return None
    if not all(_LEAST <= one <= _MOST for one in points):  # type: ignore[operator]
        return None
    first, second = map(float, points)  # type: ignore[arg-type]
    return first, second


def _better(content: dict[str, Any]) -> Verdict | None:
    better = content.get("better")
    if isinstance(better, bool) or not isinstance(better, (int, str)):
        return None
    return _BETTER.get(str(better).strip().casefold())


_READ: dict[Mode, Callable[[dict[str, Any]], Verdict | None]] = {"score": _points, "pairs": _better}
