"""Runs as curves: every metric by step, all runs overlaid; what samples.jsonl tells of rewards."""

from collections.abc import Mapping, Sequence

import numpy as np

from tools.reporting.charts import (
    FEWEST_TO_SMOOTH,
    Chart,
    Group,
    Histogram,
    Line,
    LineChart,
    bars,
    bins,
    running_mean,
    window,
)
from tools.reporting.naming import GROUPS, OPEN, group_of, in_order, name_of
from tools.reporting.runs import Curve, Run

Colours = Mapping[str, int]
STEP = "optimizer step"
APART = ("time", "memory")
"""Groups that have a section of their own."""
_FEWEST_REWARDS = 8


def curve_groups(runs: Sequence[Run], colours: Colours) -> list[Group]:
    """One a namespace, the most telling first."""
    found: dict[str, list[Chart]] = {}
    for metric in in_order({metric for run in runs for metric in run.curves}):
        found.setdefault(group_of(metric), []).append(metric_chart(metric, runs, colours))
    return [Group(name, GROUPS.get(name, name), charts, name in OPEN) for name, charts in found.items()]


def metric_chart(metric: str, runs: Sequence[Run], colours: Colours) -> LineChart:
    """One metric of all runs that have it."""
    title, unit = name_of(metric)
    lines = [_line(run.name, colours[run.name], run.curves[metric]) for run in runs if metric in run.curves]
    return LineChart(metric, title, unit, STEP, lines, metric, (0.0, float(max(run.steps for run in runs))))


def _line(name: str, colour: int, curve: Curve) -> Line:
    width = window(len(curve.values))
    smooth = running_mean(curve.values, width) if width > 1 else None
    return Line(name, colour, curve.steps, curve.values, smooth)


def smoothing(runs: Sequence[Run]) -> str:
    """What the bold lines are, with the numbers."""
    widths = {run.name: window(max(len(curve.values) for curve in run.curves.values())) for run in runs if run.curves}
    smoothed = [f"{width} records for {name}" for name, width in widths.items() if width > 1]
    if not smoothed:
        return "Lines go through the records as they are; nothing is smoothed."
    return (
        f"Faint: the records as they are. Bold: their centred mean, at most {', '.join(smoothed)}; a curve of fewer "
        f"than {FEWEST_TO_SMOOTH} records is not smoothed."
    )


def reward_charts(runs: Sequence[Run], colours: Colours) -> list[Chart]:
    """Rewards of the kept rollouts of each run: those of the first half of its steps, and those of the second."""
    charts: list[Chart] = []
    for run in runs:
        scored = [(rollout.step, rollout.reward) for rollout in run.rollouts if rollout.reward is not None]
        steps, rewards = np.array(scored, dtype=np.float64).reshape(-1, 2).T
        middle = run.steps / 2
        early, late = rewards[steps <= middle], rewards[steps > middle]
        if min(len(early), len(late)) < _FEWEST_REWARDS:
            continue
        edges = bins([rewards], at_most=16)
        series = [
            bars("first half", -1, early, edges),
            bars("second half", colours[run.name], late, edges),
        ]
        title, axis = f"Rewards of {run.name}", "mean of log p − log q over a response, nats per token"
        charts.append(Histogram(f"{run.name}/rewards", title, "share of responses", axis, edges, series))
    return charts
