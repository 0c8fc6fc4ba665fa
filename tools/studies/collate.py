"""The evaluations of several training seeds → one small JSON file and a table for RESULTS.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from distill.evaluation.table import COLUMNS, EVALUATION, markdown

Collated = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""By model, set and metric: `mean` over the seeds, their `values`, and each one's 95 % interval over prompts."""


def collate(folders: Sequence[Path]) -> Collated:
    """Of one evaluation a training seed."""
    contents = [json.loads((folder / EVALUATION).read_text(encoding="utf-8"))["figures"] for folder in folders]
    return {
        model: {
            name: {metric: _over_seeds([content[model][name][metric] for content in contents]) for metric in metrics}
            for name, metrics in sets.items()
        }
        for model, sets in contents[0].items()
    }


def _over_seeds(estimates: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    values = [estimate["value"] for estimate in estimates]
    # Of what is the same in each, such as the teacher, there is no spread over seeds to tell.
    spread = stdev(values) if len(set(values)) > 1 else None
    intervals = [[estimate["low"], estimate["high"]] for estimate in estimates]
    return {"mean": fmean(values), "sd": spread, "values": values, "intervals": intervals}


def table(collated: Collated, name: str, metrics: Sequence[str]) -> str:
    """Markdown: one row a model, mean ± standard deviation over the seeds; of one seed, its interval."""
    header = ["model", *(COLUMNS[metric][0] if metric in COLUMNS else metric for metric in metrics)]
    body = [[model, *(_cell(of[name].get(metric), metric) for metric in metrics)] for model, of in collated.items()]
    return markdown([header, *body])


def _cell(found: Mapping[str, Any] | None, metric: str) -> str:
    if found is None:
        return "–"
    decimals = COLUMNS[metric][1] if metric in COLUMNS else 3
    if found["sd"] is None:
        low, high = found["intervals"][0]
        return f"{found['mean']:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"
    return f"{found['mean']:.{decimals}f} ± {found['sd']:.{decimals}f}"
