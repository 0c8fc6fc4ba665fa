"""Where the time of a step goes, and how much memory it takes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from tools.reporting.charts import Layer, Stack
from tools.reporting.markup import esc, number, table
from tools.reporting.naming import name_of
from tools.reporting.runs import Run
from tools.reporting.training import STEP

STEP_TIME, TOTAL_TIME = "time/step", "time/total"
OTHER = "Between the phases"
_COLUMNS = 80


def phases_of(runs: Sequence[Run]) -> list[str]:
    """All phases that any run has timed, in the order in which a step goes through them."""
    known = ["time/minibatch", "time/forward", "time/backward", "time/plain_text", "time/optimizer"]
    found = {metric for run in runs for metric in run.curves if metric.startswith("time/")} - {STEP_TIME, TOTAL_TIME}
    return [name for name in known if name in found] + sorted(found - set(known))


def seconds(run: Run, phases: Sequence[str]) -> tuple[Float[ndarray, " steps"], Float[ndarray, "steps phases"]]:
    """The timed steps on record and the seconds of each phase, 0 where it had none; last what the phases leave of the
    step. A step is timed on the slowest rank, its phases on the first one."""
    timed = [record for record in run.records if STEP_TIME in record]
    steps = np.array([record["step"] for record in timed], dtype=np.float64)
    parts = np.array([[record.get(phase, 0.0) for phase in phases] for record in timed]).reshape(len(timed), -1)
    whole = np.array([record[STEP_TIME] for record in timed], dtype=np.float64)
    rest = np.maximum(whole - parts.sum(1), 0.0)
    return steps, np.column_stack([parts, rest])


def time_charts(runs: Sequence[Run]) -> list[Stack]:
    """For each run the share of each phase by step; of a long run by stretches of steps."""
    phases = phases_of(runs)
    charts = []
    for run in runs if phases else []:
        steps, parts = seconds(run, phases)
        if not len(steps) or not parts.sum():
            continue
        # Stretches of equal length: rounds come at a beat, and unequal ones would beat against it.
        length = -(-len(steps) // _COLUMNS)
        groups = [np.arange(len(steps))[start : start + length] for start in range(0, len(steps), length)]
        sums = np.array([parts[group].sum(0) for group in groups])
        shares = sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)
        edges = np.array([*(steps[group[0]] - 0.5 for group in groups), steps[-1] + 0.5])
        layers = [Layer(name, place, shares[:, place]) for place, name in enumerate(layer_names(phases))]
        charts.append(Stack(f"{run.name}/time", run.name, "share of the time", STEP, edges, layers))
    return charts


def layer_names(phases: Sequence[str]) -> list[str]:
    """Of a stack's layers, the lowest first."""
    return [*(name_of(phase).title for phase in phases), OTHER]


def totals(runs: Sequence[Run]) -> str:
    """Seconds of each phase over the steps on record, as a table with a bar a run."""
    phases = phases_of(runs)
    rows = []
    for run in runs if phases else []:
        steps, parts = seconds(run, phases)
        whole = parts.sum()
        if not whole:
            continue
        shares = parts.sum(0) / whole
        bar = "".join(f'<i class=p{i} style="width:{100 * s:.2f}%"></i>' for i, s in enumerate(shares))
        cells = [f"{number(s * whole, 1)} s<small>{number(100 * s, 1)} %</small>" for s in shares]
        name = f"{esc(run.name)}<span class=share>{bar}</span>"
        rows.append([name, *cells, f"{number(whole, 1)} s", str(len(steps))])
    if not rows:
        return ""
    keys = [f"<i class='dot p{place}'></i>{esc(name)}" for place, name in enumerate(layer_names(phases))]
    return table(["run", *keys, "together", "steps"], rows, "totals")


def memory_table(runs: Sequence[Run]) -> str:
    """First, largest and last value of every memory metric."""
    rows = []
    for run in runs:
        for metric, curve in run.curves.items():
            if metric.startswith("memory/"):
                title, unit = name_of(metric)
                values = curve.values[0], curve.values.max(), curve.values[-1]
                cells = [f"{number(float(value), 2)} {esc(unit)}" for value in values]
                rows.append([esc(run.name), f"{esc(title)} <code>{esc(metric)}</code>", *cells])
    return table(["run", "what", "first", "largest", "last"], rows, "memory") if rows else ""
