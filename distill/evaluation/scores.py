"""What was measured of each row of a set: kept beside the answers, so that adding a model measures that one alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from distill.checkpoint.disk import replace_file
from distill.evaluation.reading import Values


@dataclass
class Tokens:
    """Figures of the tokens of some rows, R of them; row r has the next `lengths[r]` of each array."""

    lengths: Float[ndarray, " rows"]
    values: dict[str, Float[ndarray, " tokens"]]

    @classmethod
    def of(cls, values: Values) -> "Tokens":
        """From a list a row."""
        lengths = np.array([len(row) for row in next(iter(values.values()))])
        return cls(lengths, {name: np.concatenate(rows) for name, rows in values.items()})

    def sums(self, name: str, rows: int) -> Float[ndarray, " rows"]:
        """Σ over each row's tokens; rows of several seeds, one seed after the other, are added up to `rows`."""
        ends = np.cumsum(self.lengths)
        total = np.concatenate([[0.0], np.cumsum(self.values[name])])
        return np.asarray((total[ends] - total[ends - self.lengths]).reshape(-1, rows).sum(0))

    def counts(self, rows: int) -> Float[ndarray, " rows"]:
        """Tokens, likewise."""
        return self.lengths.reshape(-1, rows).sum(0).astype(np.float64)

    def by_position(self, name: str) -> Float[ndarray, "rows longest"]:
        """One line a row, NaN past its end."""
        out = np.full((len(self.lengths), int(self.lengths.max())), np.nan)
        out[np.arange(out.shape[1]) < self.lengths[:, None]] = self.values[name]
        return out


@dataclass
class Scores:
    """Of one model on one set."""

    rows: dict[str, Float[ndarray, "seeds rows"]] = field(default_factory=dict)
    """Text figures of each response."""
    own: Tokens | None = None
    """On its own responses of the compared seeds; of plain text and choices, on what is given."""
    taught: Tokens | None = None
    """On the teacher's responses of the same seeds."""

    @property
    def given(self) -> Tokens:
        """On plain text or choices."""
        assert self.own is not None
        return self.own

    def save(self, path: Path, origin: Mapping[str, Any]) -> None:
        """Write the file, whole or not at all, with what the scores depend on."""
        arrays: dict[str, Any] = {f"rows/{name}": value for name, value in self.rows.items()}
        for kind, tokens in (("own", self.own), ("taught", self.taught)):
            if tokens is not None:
                arrays[f"{kind}/lengths"] = tokens.lengths
                arrays |= {f"{kind}/values/{name}": value for name, value in tokens.values.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(arrays, metadata={"origin": json.dumps(origin)}))

    @classmethod
    def load(cls, path: Path, origin: Mapping[str, Any]) -> "Scores | None":
        """What `save` wrote, or None if there is nothing, or of another origin."""
        try:
            with safe_open(path, "numpy") as file:
                if json.loads((file.metadata() or {}).get("origin", "{}")) != json.loads(json.dumps(origin)):
                    return None
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError):
            return None  # none, or a torn one: to be made again
        found = cls({name.partition("/")[2]: value for name, value in arrays.items() if name.startswith("rows/")})
        for kind in ("own", "taught"):
            if f"{kind}/lengths" in arrays:
                head = f"{kind}/values/"
                values = {name.removeprefix(head): value for name, value in arrays.items() if name.startswith(head)}
                setattr(found, kind, Tokens(arrays[f"{kind}/lengths"], values))
        return found
