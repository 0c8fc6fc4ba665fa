"""Runs and evaluations as they lie on disk, made by hand, and pages read back."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distill.evaluation.scores import Scores

_VOID = {"meta", "br", "link", "img", "input", "hr", "wbr", "path", "polyline"}


def make_run(
    folder: Path,
    records: Iterable[Mapping[str, float]],
    settings: Mapping[str, Any] | None = None,
    rollouts: Iterable[Mapping[str, Any]] = (),
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    if rollouts:
        (folder / "samples.jsonl").write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts))
    return folder


def estimate(value: float, spread: float = 0.5) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def difference(value: float, spread: float = 0.5, p: float = 0.04) -> dict[str, float]:
    return estimate(value, spread) | {"p": p}


def positions(count: int, level: float) -> dict[str, list[float]]:
    return {
        "forward_kl_after_own": [level + place / 10 for place in range(count)],
        "forward_kl_after_teachers": [level] * count,
        "reverse_kl_after_own": [level / 2 + place / 20 for place in range(count)],
        "excess_accumulated_error": [5.0 * place for place in range(count)],
        "rows": [40 - place for place in range(count)],
    }


def evaluation(
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]],
    differences: Iterable[Mapping[str, Any]] = (),
    samples: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Of `held-out`; `figures` are model → set → figure → estimate."""
    sets = {name for of in figures.values() for name in of}
    kinds = {"sets": "held-out", "choices": "pets", "texts": "wiki"}
    suite = {kind: {name: f"{name}.jsonl"} if name in sets else {} for kind, name in kinds.items()}
    suite |= {"template": "chat", "max_new_tokens": 24, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    suite |= {"seeds": [1, 2], "compared_seeds": 1, "resamples": 2000, "teacher": {"path": "big"}}
    return {
        "suite": suite,
        "models": {name: {"path": f"runs/{name}/student", "weights": "0"} for name in figures},
        "figures": figures,
        "curves": {
            name: {"held-out": {} if name == "teacher" else positions(12, 1.0 + place)}
            for place, name in enumerate(figures)
        },
        "differences": list(differences),
        "samples": {"held-out": list(samples)},
    }


def write_evaluation(
    folder: Path, content: Mapping[str, Any], lengths: Mapping[str, list[list[float]]] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(content))
    for model, of in (lengths or {}).items():
        Scores({"length": np.array(of)}).save(folder / model / "held-out.scores.safetensors", {})
    return folder


@dataclass
class Element:
    """A tag and what is in it."""

    tag: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    def all(self, tag: str | None = None, kind: str | None = None) -> list["Element"]:
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if (tag is None or child.tag == tag) and (kind is None or kind in child.classes):
                    found.append(child)
                found += child.all(tag, kind)
        return found

    def by_id(self, name: str) -> "Element":
        return next(one for one in self.all() if one.attributes.get("id") == name)

    def rows(self) -> list[list["Element"]]:
        """Of a table: its cells."""
        return [[cell for cell in row.children if isinstance(cell, Element)] for row in self.all("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(html: str) -> Element:
    """The document; every tag must be closed, in order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [reader.root], f"<{reader.open[-1].tag}> is left open"
    return reader.root


def points(svg: Element, series: str) -> list[tuple[float, float]]:
    """A line's points in the units of its axes."""
    (x0, x1), (y0, y1) = (map(float, (svg.attributes[f"data-{axis}"] or "").split()) for axis in "xy")
    lines = [one for one in svg.all("polyline", "line") if one.attributes["data-series"] == series]
    assert len(lines) == 1
    pairs = [point.split(",") for point in (lines[0].attributes["points"] or "").split()]
    return [(x0 + (float(x) - 46) / 286 * (x1 - x0), y0 + (166 - float(y)) / 158 * (y1 - y0)) for x, y in pairs]


SFT = {"objective": {"name": "sft"}, "optim": {"lr": 0.001, "steps": 60, "betas": [0.9, 0.95]}, "teacher": None}
MINILLM = {
    "objective": {"name": "minillm", "gamma": 0.95},
    "optim": {"lr": 0.0003, "steps": 60, "betas": [0.9, 0.95]},
    "teacher": {"path": "models/big"},
}
SAMPLE = {"prompt": "Why?", "references": ["So.", "Thus."], "responses": {"teacher": "T", "sft": "S", "minillm": "M"}}


def records(count: int = 60, level: float = 2.0) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for step in range(1, count + 1):
        phases = {
            "time/minibatch": 1.0,
            "time/forward": 2.0,
            "time/backward": 4.0,
            "time/step": 8.0,
            "time/total": 8.0 * step,
        }
        loss = level + math.sin(step) / step
        found.append({"step": step, "loss/total": loss, "memory/peak_gib": 1 + step / 100} | phases)
    return [*found, {"step": count, "valid/rouge_l": 10.0, "valid/loss": 3.25}]


def figures(**models: tuple[float, float]) -> dict[str, Any]:
    """Rouge-L and KL of each."""
    return {
        name: {"held-out": {"rouge_l": estimate(rouge), "reverse_kl": estimate(kl, 0.05), "length": estimate(20.0)}}
        for name, (rouge, kl) in models.items()
    }


def two_runs(folder: Path) -> list[Path]:
    """An `sft` and a `minillm`, which has put rollouts on record."""
    rollouts = [
        {"step": step, "prompt": "p", "response": f"r{step}", "reward": step / 10, "teacher_share": 0.25}
        for step in range(1, 61)
    ]
    return [
        make_run(folder / "sft", records(), SFT),
        make_run(folder / "minillm", records(level=1.0), MINILLM, rollouts),
    ]


def judged_folder(folder: Path) -> Path:
    """An evaluation of both: minillm has the higher Rouge-L for sure, the lower KL perhaps."""
    differences = {"rouge_l": difference(3.0, 0.5, 0.0005), "reverse_kl": difference(-0.1, 0.2, 0.31)}
    pair = {"set": "held-out", "model": "minillm", "minus": "sft", "figures": differences}
    measured = figures(teacher=(20.0, 0.0), sft=(12.25, 1.75), minillm=(15.25, 1.65))
    measured["sft"] |= {"pets": {"accuracy": estimate(0.5, 0.1), "ece": estimate(0.25, 0.1)}}
    measured["minillm"] |= {"wiki": {"perplexity": estimate(31.5, 2.0)}}
    content = evaluation(measured, [pair], [SAMPLE] * 6)
    return write_evaluation(folder / "judged", content, {"sft": [[10.0, 20.0]], "minillm": [[20.0, 30.0]]})
