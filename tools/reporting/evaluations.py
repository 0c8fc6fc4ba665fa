"""The folder of an evaluation, read: all figures, and the length of each response where the scores lie beside them."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from distill.errors import BadInput, Problem
from distill.evaluation.subjects import TEACHER
from distill.evaluation.table import EVALUATION


class Estimate(BaseModel):
    """A figure with the limits of its 95 % interval."""

    value: float
    low: float
    high: float


class Difference(Estimate):
    """Of two models on the same rows; `p` is two-sided."""

    p: float

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


class Positions(BaseModel):
    """Means by position in a response; all of one length, or all empty."""

    forward_kl_after_own: list[float] = []
    forward_kl_after_teachers: list[float] = []
    reverse_kl_after_own: list[float] = []
    excess_accumulated_error: list[float] = []
    rows: list[int] = []


class Pair(BaseModel):
    """`model` minus `minus` on one set."""

    set: str
    model: str
    minus: str
    figures: dict[str, Difference]


class Sample(BaseModel):
    """One prompt and what each model answered."""

    prompt: str
    references: list[str]
    responses: dict[str, str]


class Model(BaseModel):
    """What was measured."""

    path: str


class Asked(BaseModel):
    """What the page says of a suite."""

    sets: dict[str, str]
    choices: dict[str, str]
    texts: dict[str, str]
    template: str
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seeds: list[int]
    compared_seeds: int


class Content(BaseModel):
    """`evaluation.json`, as `distill evaluate` writes it."""

    suite: Asked
    models: dict[str, Model]
    figures: dict[str, dict[str, dict[str, Estimate]]]
    curves: dict[str, dict[str, Positions]]
    differences: list[Pair]
    samples: dict[str, list[Sample]]


@dataclass(frozen=True)
class Evaluation:
    """One of them; `name` is that of its folder."""

    name: str
    content: Content
    lengths: dict[str, dict[str, Float[ndarray, " responses"]]] = field(default_factory=dict)
    """Set → model → tokens of each response, of all seeds; what is not there is left out."""

    @property
    def models(self) -> list[str]:
        """All, in the order in which they were measured; the teacher, where there is one, is the first."""
        return list(self.content.models)

    @property
    def students(self) -> list[str]:
        """All but the teacher."""
        return [name for name in self.models if name != TEACHER]

    def figure(self, model: str, set_name: str, key: str) -> Estimate | None:
        """One figure; None where it was not measured."""
        return self.content.figures.get(model, {}).get(set_name, {}).get(key)

    def difference(self, model: str, minus: str, set_name: str, key: str) -> Difference | None:
        """`model` minus `minus`, whichever way round the file holds the pair; None where it was not measured."""
        for pair in self.content.differences:
            if pair.set != set_name or key not in pair.figures:
                continue
            found = pair.figures[key]
            if (pair.model, pair.minus) == (model, minus):
                return found
            if (pair.model, pair.minus) == (minus, model):
                return Difference(value=-found.value, low=-found.high, high=-found.low, p=found.p)
        return None


def read_evaluation(folder: Path) -> Evaluation:
    """What `distill evaluate --out` has written.

    Raises:
        BadInput: no such folder, or no evaluation in it.
    """
    if folder.is_file():
        mend = f"give the folder of `distill evaluate --out`, which holds {EVALUATION}"
        raise BadInput(Problem("--evaluation", str(folder), "is a file", mend))
    path = folder / EVALUATION
    if not path.is_file():
        wrong = f"no {EVALUATION} in it" if folder.is_dir() else "no such folder"
        raise BadInput(Problem("--evaluation", str(folder), wrong, "run `distill evaluate` first"))
    try:
        content = Content.model_validate_json(path.read_bytes())
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        wrong = "is no evaluation" + (f" (at {where})" if where else "")
        mend = "give what `distill evaluate --out` has written"
        raise BadInput(Problem("--evaluation", str(path), wrong, mend)) from None
    lengths = {
        name: {model: found for model in content.models if (found := _lengths(folder, model, name)) is not None}
        for name in content.suite.sets
    }
    return Evaluation(folder.resolve().name, content, lengths)


def _lengths(folder: Path, model: str, set_name: str) -> Float[ndarray, " responses"] | None:
    path = folder / model / f"{set_name}.scores.safetensors"
    # The names come from a file: they may lead nowhere else.
    if not path.resolve().is_relative_to(folder.resolve()):
        return None
    try:
        with safe_open(path, "numpy") as file:
            found = np.asarray(file.get_tensor("rows/length"), dtype=np.float64).ravel()
    except (OSError, SafetensorError):
        return None
    return found if len(found) and np.isfinite(found).all() else None
