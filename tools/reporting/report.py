"""What a page is made of, and all its charts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from distill.evaluation.subjects import TEACHER
from tools.reporting import costs, results
from tools.reporting.charts import Group
from tools.reporting.evaluations import Evaluation
from tools.reporting.runs import Run
from tools.reporting.training import curve_groups, reward_charts


@dataclass(frozen=True)
class Report:
    """Runs and evaluations, in the order in which they were named."""

    runs: Sequence[Run]
    evaluations: Sequence[Evaluation] = ()

    @cached_property
    def colours(self) -> dict[str, int]:
        """Run or model → place in the palette. A model has the colour of the run of its name, or of that in whose
        folder it lies; the teacher has none."""
        places = {run.name: place for place, run in enumerate(self.runs)}
        for evaluation in self.evaluations:
            for name in evaluation.students:
                folder = Path(evaluation.content.models[name].path).parent.name
                places.setdefault(name, places.get(folder, max(places.values(), default=-1) + 1))
        return places | {TEACHER: -1}

    @property
    def sets(self) -> Iterator[tuple[Evaluation, str]]:
        """Each set of each evaluation, choices and texts too."""
        for evaluation in self.evaluations:
            suite = evaluation.content.suite
            yield from ((evaluation, name) for kind in (suite.sets, suite.choices, suite.texts) for name in kind)

    @cached_property
    def positions(self) -> list[Group]:
        """Fidelity along the response, a group a set."""
        groups = [Group("", name, results.position_charts(of, name, self.colours)) for of, name in self.sets]
        return [group for group in groups if group.charts]

    @cached_property
    def lengths(self) -> Group:
        """How long responses are, a chart a set."""
        charts = [chart for of, name in self.sets for chart in results.length_chart(of, name, self.colours)]
        return Group("lengths", "Response lengths", charts)

    @cached_property
    def curves(self) -> list[Group]:
        """Every metric of the runs, a group a namespace."""
        return curve_groups(self.runs, self.colours)

    @cached_property
    def rewards(self) -> Group:
        """A chart a run."""
        return Group("rewards", "Rewards", reward_charts(self.runs, self.colours))

    @cached_property
    def time(self) -> Group:
        """Where each step's time goes, a chart a run."""
        return Group("shares", "Shares of a step", costs.time_charts(self.runs))

    @property
    def groups(self) -> list[Group]:
        """All of them."""
        return [*self.positions, self.lengths, *self.curves, self.rewards, self.time]
