"""What to change: every knob is turned in the config and the run planned again."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from distill.checks.deepspeed import check_deepspeed
from distill.checks.layout import check_batches, check_parallel
from distill.checks.report import Report
from distill.config import Config
from distill.planning.memory import gathers_once
from distill.planning.plan import Plan
from distill.planning.setup import check_models, with_config

SHIPPED = Path(__file__).resolve().parent.parent.parent / "ds_configs"

# A knob that saves less is not worth a line.
_WORTH_IT = 0.01
# Estimates know nothing of how long it takes to start a collective, of which higher stages have more.
_NEARLY = 1.1


@dataclass(frozen=True)
class Advice:
    """Settings and the plan under them."""

    overrides: tuple[str, ...]
    """As the command line takes them: settings of the run, or `--nodes`."""
    plan: Plan


def knobs(plan: Plan) -> list[Advice]:
    """Single changes that lower the peak, the one that lowers it most first; where none is enough by itself, then a
    combination that is, if there is one; last, more nodes."""
    found = [_planned(plan, change) for change in _changes(plan)]
    better = [advice for advice in found if advice and advice.plan.memory.peak < plan.memory.peak * (1 - _WORTH_IT)]
    better.sort(key=lambda advice: advice.plan.memory.peak)
    if better and not any(advice.plan.fits for advice in better):
        together = _together(plan)
        if together.plan.fits:
            better.append(together)
    return [*better, *_more_nodes(plan)]


def _more_nodes(plan: Plan) -> Iterator[Advice]:
    """The run on two, four and eight times the nodes, up to where it fits."""
    for factor in (2, 4, 8):
        cluster = replace(plan.setup.cluster, nodes=plan.setup.cluster.nodes * factor)
        if _is_valid(plan.setup.config, cluster.ranks):
            found = Advice((f"--nodes {cluster.nodes}",), Plan.of(replace(plan.setup, cluster=cluster)))
            yield found
            if found.plan.fits:
                return


def deepspeed_choices(plan: Plan) -> list[Advice]:
    """The run under each shipped DeepSpeed config, the one that suits first: the lowest stage of those that fit and
    are nearly as fast as the fastest. What does not fit comes last, the smallest first."""
    planned = [_planned(plan, (f"parallel.deepspeed={_shown(path)}",)) for path in sorted(SHIPPED.glob("*.json"))]
    found = [advice for advice in planned if advice]
    fastest = min((advice.plan.duration.step for advice in found if advice.plan.fits), default=0.0)

    def order(advice: Advice) -> tuple[bool, bool, float]:
        made = advice.plan
        if not made.fits:
            return True, False, made.memory.peak
        slow = made.duration.step > fastest * _NEARLY
        return False, slow, made.duration.step if slow else made.setup.zero.stage

    return sorted(found, key=order)


def _changes(plan: Plan) -> Iterator[tuple[str, ...]]:
    setup, config = plan.setup, plan.setup.config
    if not config.student.gradient_checkpointing:
        yield ("student.gradient_checkpointing=true",)
    if config.optim.micro_batch > 1:
        yield from ((f"optim.micro_batch={size}",) for size in sorted({config.optim.micro_batch // 2, 1}))
    for path in sorted(SHIPPED.glob("*.json")):
        if path.read_bytes() != config.parallel.deepspeed.read_bytes():
            yield (f"parallel.deepspeed={_shown(path)}",)
    yield from _degrees(plan)
    if setup.samples:
        rows = min(config.rollout.batch, setup.decoded)
        yield from ((f"rollout.batch={size}",) for size in sorted({rows // 4, rows // 2} - {0}))
        if config.rollout.teacher_cache == "device":
            yield ("rollout.teacher_cache=host",)
        if config.rollout.engine == "builtin" and setup.zero.stage == 3 and gathers_once(setup):
            yield ("rollout.gather=layer",)


def _degrees(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Higher tensor-parallel degrees within a node: of both models, or of the teacher beside a student that is whole.
    Those that cannot be fall away with the other runs that are none."""
    setup = plan.setup
    student, teacher = setup.student.tp, setup.teacher.tp if setup.teacher else 0
    for tp in range(2, setup.cluster.per_node + 1):
        if setup.cluster.per_node % tp:
            continue
        if tp > student:
            yield (f"parallel.student_tp={tp}", *([f"parallel.teacher_tp={tp}"] if teacher else []))
        if teacher and (student, teacher) < (1, tp):
            yield (("parallel.student_tp=1", f"parallel.teacher_tp={tp}"))


def _together(plan: Plan) -> Advice:
    """Change after change, each time the one that lowers the peak most, until it fits or nothing helps."""
    best = Advice((), plan)
    while not best.plan.fits:
        found = [_planned(best.plan, change, best.overrides) for change in _changes(best.plan)]
        better = [advice for advice in found if advice and advice.plan.memory.peak < best.plan.memory.peak]
        if not better:
            break
        best = min(better, key=lambda advice: advice.plan.memory.peak)
    return best


def _planned(plan: Plan, change: tuple[str, ...], before: tuple[str, ...] = ()) -> Advice | None:
    """The run with this change planned anew; None where it is no valid run."""
    config = plan.setup.config
    for override in change:
        config = _with(config, override)
    if not _is_valid(config, plan.setup.cluster.ranks):
        return None
    keys = {override.partition("=")[0] for override in change}
    kept = tuple(override for override in before if override.partition("=")[0] not in keys)
    return Advice((*kept, *change), Plan.of(with_config(plan.setup, config)))


def _is_valid(config: Config, ranks: int) -> bool:
    report = Report()
    check_parallel(config, ranks, report)
    check_batches(config, ranks, report)
    check_deepspeed(config, report)
    check_models(config, report)
    return not report.problems


def _with(config: Config, override: str) -> Config:
    key, _, value = override.partition("=")
    section, name = key.split(".")
    settings = config.model_dump()
    settings[section][name] = SHIPPED / Path(value).name if key == "parallel.deepspeed" else value
    return Config.model_validate(settings)


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
