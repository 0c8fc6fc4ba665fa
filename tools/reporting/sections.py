"""The sections of the page, in reading order: what came out first, how it came about after it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tools.reporting import costs, results, settings, svg, texts
from tools.reporting.charts import Chart, Histogram, LineChart
from tools.reporting.evaluations import Evaluation
from tools.reporting.markup import esc, folded, number, tag
from tools.reporting.naming import FIGURES
from tools.reporting.report import Report
from tools.reporting.training import APART, smoothing


class Section(NamedTuple):
    """One part of the page, of markup; without content it is left out."""

    name: str
    title: str
    lead: str
    content: str


def sections(report: Report) -> Iterator[Section]:
    """All of them."""
    differing = settings.differences_table(report.runs, report.colours) if len(report.runs) > 1 else ""
    lead = "Keys whose values differ; a dash where a run has no such key." if differing else ""
    results_ = "".join(_results(evaluation, report) for evaluation in report.evaluations)
    yield Section("results", "Results", "", results_)
    yield Section("positions", "Along the response", _ABOUT_POSITIONS, _positions(report))
    yield Section(
        "responses", "Responses", "The same prompts for all models; what the first seed drew.", _texts(report)
    )
    yield Section("settings", "Settings", lead, differing + settings.all_settings(report.runs))
    yield Section("curves", "Training curves", esc(smoothing(report.runs)), _curves(report))
    scored = any(rollout.reward is not None for run in report.runs for rollout in run.rollouts)
    yield Section("rollouts", "Rollouts", _ABOUT_REWARDS if scored else "", _rollouts(report))
    yield Section("costs", "Time and memory", "", _costs(report))


_ABOUT_POSITIONS = (
    "How far the student’s next-token distribution q is from the teacher’s p at each position, over the responses that "
    "reach it. The excess accumulated error (ExAccErr) is what gathers after the student’s own text beyond that after "
    "the teacher’s, in percent of it; 0 is no exposure bias."
)
_ABOUT_REWARDS = (
    "Of the rollouts that each round has put on record (<code>log.samples</code>): a few of those trained on. The "
    "reward is log p − log q, here the mean over a response, neither scaled nor clipped."
)
_ABOUT_MARKS = (
    "A marked value is better than that of every other student: the 95 % interval of each paired difference excludes "
    "0. Nothing is corrected for many comparisons."
)
_ABOUT_TIME = (
    "Sums over the steps on record. A step is timed on the slowest rank, its phases on the first; what they leave of "
    "it is waiting, counting and logging. Validation and saving are no part of a step."
)


def _results(evaluation: Evaluation, report: Report) -> str:
    suite = evaluation.content.suite
    many = len(suite.seeds)
    asked = f"{many} sampled responses to each prompt" if many > 1 else "One sampled response to each prompt"
    how = f"temperature {suite.temperature:g}, at most {suite.max_new_tokens} tokens, template {suite.template}"
    parts = [f"<h3>{esc(evaluation.name)}</h3>"] if len(report.evaluations) > 1 else []
    parts.append(f"<p class=lead>{esc(asked)}; {esc(how)}. Small figures and lines are 95 % intervals.</p>")
    shown: dict[str, None] = {}
    for of, name in report.sets:
        if of is evaluation:
            shown |= dict.fromkeys(results.columns(evaluation, name))
            parts.append(f"<h4>{esc(name)}</h4>{results.figures_table(evaluation, name, report.colours)}")
            if differences := results.differences_table(evaluation, name):
                parts.append(folded("Differences of each two students, on the same prompts", differences, is_open=True))
    if len(evaluation.students) > 1:
        parts.append(f"<p class=fine>{_ABOUT_MARKS}</p>")
    terms = "".join(f"<dt>{esc(results.COLUMNS[key][0])}</dt><dd>{esc(FIGURES[key])}</dd>" for key in shown)
    return "".join(parts) + folded("What the figures say", f"<dl class=terms>{terms}</dl>")


def _positions(report: Report) -> str:
    several = len(report.positions) > 1
    return "".join(
        (f"<h4>{esc(group.title)}</h4>" if several else "") + _legend(group.charts) + grid(group.charts, "two")
        for group in report.positions
    )


def grid(charts: Iterable[Chart], kind: str = "") -> str:
    """Charts beside each other, as many as there is room for; or larger ones, by twos."""
    return f"<div class='grid {kind}'>{''.join(map(svg.figure, charts))}</div>"


def _legend(charts: Sequence[Chart]) -> str:
    """Each model once; what a line's name adds after a comma is told by the captions."""
    lines = [line for chart in charts if isinstance(chart, LineChart) for line in chart.lines if not line.dashed]
    found = {line.name.partition(", ")[0]: line.colour for line in lines}
    return f"<p class=legend>{''.join(tag(name, colour) for name, colour in found.items())}</p>"


def _texts(report: Report) -> str:
    parts = []
    for chart in report.lengths.charts:
        assert isinstance(chart, Histogram)
        means = "".join(
            f"<span>{tag(one.name, one.colour)} {number(one.mean, 1)} of {one.count}</span>" for one in chart.series
        )
        parts.append(f"<div class=beside>{svg.figure(chart)}<p class=legend>Mean length {means}</p></div>")
    for evaluation, name in report.sets:
        if cards := texts.samples(evaluation, name, report.colours):
            parts.append(f"<h4>{esc(name)}</h4>{cards}")
    return "".join(parts)


def _curves(report: Report) -> str:
    buttons = "".join(
        f'<button type=button data-toggle="{esc(run.name)}" aria-pressed=true>'
        f"{tag(run.name, report.colours[run.name])}</button>"
        for run in report.runs
    )
    groups = "".join(
        folded(f"{esc(group.title)} <small>{len(group.charts)}</small>", grid(group.charts), group.is_open, "group")
        for group in report.curves
        if group.name not in APART
    )
    return f"<div class=toggles>{buttons}</div>{groups}" if groups else ""


def _rollouts(report: Report) -> str:
    parts = []
    if report.rewards.charts:
        parts.append(grid(report.rewards.charts))
        parts.append("<p class=legend>Grey: first half of the run’s steps. Coloured: second half.</p>")
    return "".join(parts) + "".join(texts.rollouts(run, report.colours) for run in report.runs)


def _costs(report: Report) -> str:
    parts = [costs.totals(report.runs)]
    if report.time.charts:
        parts += [grid(report.time.charts), f"<p class=fine>{_ABOUT_TIME}</p>"]
    parts.append(costs.memory_table(report.runs))
    for group in report.curves:
        if group.name in APART:
            title = f"{esc(group.title)} by step <small>{len(group.charts)}</small>"
            parts.append(folded(title, grid(group.charts), kind="group"))
    return "".join(parts)
