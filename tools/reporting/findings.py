"""What a reader must not miss: the headline, and what looks wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from pydantic import ValidationError

from distill import alarms
from distill.config import FaultSettings
from distill.evaluation.subjects import TEACHER
from tools.reporting.evaluations import Estimate, Evaluation
from tools.reporting.runs import Curve, Run

NEVER_ALONE = "reverse KL alone is never a success signal"
# Rouge-L that is so much below its best has fallen, lengths under this share have collapsed, and a share of repeated
# 4-grams above this is seen by any reader.
_FALLEN, _COLLAPSED, _REPEATED = 0.95, 0.5, 0.2
_ENDS = 0.1
"""Share of a run at its start and at its end that are held against each other."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about `subject`, a run or a model."""

    subject: str
    text: str
    is_warning: bool = True


def headline(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    """The result in a sentence or two; of held-out responses where there are any, else of validation."""
    for evaluation in evaluations:
        for name in evaluation.content.suite.sets:
            if sentence := _of_set(evaluation, name) or _of_distance(evaluation, name):
                return sentence
    return _of_validation(runs)


def ranked(evaluation: Evaluation, set_name: str, key: str) -> list[tuple[str, Estimate]]:
    """Students by that figure, the highest first."""
    found = [(name, evaluation.figure(name, set_name, key)) for name in evaluation.students]
    return sorted(((name, one) for name, one in found if one), key=lambda pair: -pair[1].value)


def _of_set(evaluation: Evaluation, name: str) -> str:
    order = ranked(evaluation, name, "rouge_l")
    if not order:
        return ""
    (best, figure), others = order[0], [model for model, _ in order[1:]]
    teacher = evaluation.figure(TEACHER, name, "rouge_l")
    beside = f" The teacher itself has {teacher.value:.1f}." if teacher else ""
    reached = f"{figure.value:.1f} [{figure.low:.1f}, {figure.high:.1f}]"
    if not others:
        return f"{best} reaches Rouge-L {reached} on {name}.{beside}"
    unsure = [other for other in others if not _is_above(evaluation, best, other, name)]
    if not unsure:
        surely = f"Rouge-L {reached}; its lead over every other student is beyond chance (95 % intervals)"
        return f"{best} comes closest to the references of {name}: {surely}.{beside}"
    lead = f"but its lead over {_listed(unsure)} may be chance (95 % intervals)"
    return f"{best} has the highest Rouge-L on {name}, {reached}, {lead}.{beside}"


def _of_distance(evaluation: Evaluation, name: str) -> str:
    """Of a set without references."""
    order = ranked(evaluation, name, "reverse_kl")
    if not order:
        return ""
    nearest, figure = order[-1]
    reached = f"KL(q‖p) {figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}] nats a token"
    return f"{nearest} is nearest to the teacher on {name}: {reached} of its own text; {NEVER_ALONE}."


def _is_above(evaluation: Evaluation, one: str, other: str, set_name: str) -> bool:
    found = evaluation.difference(one, other, set_name, "rouge_l")
    return found is not None and found.low > 0


def _of_validation(runs: Sequence[Run]) -> str:
    for metric, what, sign, decimals in (
        ("valid/rouge_l", "best validation Rouge-L", 1, 1),
        ("valid/loss", "lowest validation loss", -1, 3),
    ):
        curves = [(run.name, run.curves[metric]) for run in runs if metric in run.curves]
        if curves:
            name, curve = max(curves, key=lambda pair: (sign * pair[1].values).max())
            place = int((sign * curve.values).argmax())
            value = f"{curve.values[place]:.{decimals}f}"
            return f"The {what} is {value}, of {name} at step {curve.steps[place]:g}. Nothing is evaluated yet."
    return "Nothing is validated or evaluated yet."


def findings(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> list[Finding]:
    """All, warnings first."""
    found = [one for run in runs for one in of_run(run)]
    found += [one for evaluation in evaluations for one in of_evaluation(evaluation)]
    return sorted(found, key=lambda one: not one.is_warning)


def of_run(run: Run) -> Iterator[Finding]:
    """Skipped steps, alarms, text that gets worse while KL falls; whether it has ended."""
    if skipped := run.last("fault/skipped_steps"):
        row = run.curves["fault/skipped_in_a_row"].values.max() if "fault/skipped_in_a_row" in run.curves else 0
        many = f", up to {row:g} in a row" if row > 1 else ""
        yield Finding(run.name, f"{skipped:g} steps were skipped{many}: a number in them was not finite.")
    yield from _alarms(run)
    yield from _validation_parts(run)
    yield from _rollouts_shrink(run)
    planned, timed = run.setting("optim", "steps"), run.setting("optim", "max_minutes")
    if isinstance(planned, int) and run.steps < planned and timed is None:
        yield Finding(run.name, f"stands at step {run.steps} of {planned}.", is_warning=False)


def _alarms(run: Run) -> Iterator[Finding]:
    """What the run has warned of, found again in its records."""
    try:
        settings = FaultSettings.model_validate(run.settings.get("fault", {}))
    except ValidationError:
        settings = FaultSettings()
    memory: alarms.Memory = {}
    told: dict[str, list[tuple[int, str]]] = {}
    needed = {"loss/total", "rollout/response_length", "rollout/eos_rate"}
    for record in run.records:
        if record.get("fault/skipped_in_a_row") or not record.keys() >= (
            needed if "rollout/distinct_4" in record else {"loss/total"}
        ):
            continue
        step = int(record["step"])
        found, memory = alarms.look(record, memory, settings, step)
        for alarm in found:
            told.setdefault(alarm.title, []).append((step, alarm.text))
    for title, cases in told.items():
        (step, text), more = cases[0], len(cases) - 1
        again = f" It came again {more} times, last at step {cases[-1][0]}." if more else ""
        yield Finding(run.name, f"{title} at step {step}: {text}.{again}")


def _validation_parts(run: Run) -> Iterator[Finding]:
    names = "valid/rouge_l", "valid/reverse_kl", "valid/mean_length"
    if any(name not in run.curves for name in names):
        return
    rouge, kl, length = (run.curves[name] for name in names)
    if not len(rouge.steps) == len(kl.steps) == len(length.steps):
        return  # a record was cut off between them
    best = int(rouge.values.argmax())
    if kl.values[-1] < kl.values[best] and rouge.values[-1] < _FALLEN * rouge.values[best]:
        yield Finding(
            run.name,
            f"after step {rouge.steps[best]:g} validation KL(q‖p) went on falling ({_from_to(kl, best)}) while Rouge-L "
            f"fell ({_from_to(rouge, best, 1)}): {NEVER_ALONE}. The student of the best Rouge-L is the one kept.",
        )
    if kl.values[-1] < kl.values[0] and length.values[-1] < _COLLAPSED * length.values[0]:
        yield Finding(
            run.name,
            f"validation KL(q‖p) fell ({_from_to(kl, 0)}) while responses shrank ({_from_to(length, 0, 1)} tokens): "
            f"{NEVER_ALONE}.",
        )


def _from_to(curve: Curve, place: int, decimals: int = 3) -> str:
    return f"{curve.values[place]:.{decimals}f} → {curve.values[-1]:.{decimals}f}"


def _rollouts_shrink(run: Run) -> Iterator[Finding]:
    names = "student/reverse_kl", "rollout/response_length"
    if any(name not in run.curves for name in names):
        return
    (kl_then, kl_now), (then, now) = (_both_ends(run.curves[name]) for name in names)
    if kl_now < kl_then and now < _COLLAPSED * then:
        yield Finding(
            run.name,
            f"KL(q‖p) fell over training ({kl_then:.3f} → {kl_now:.3f}) while rollouts shrank ({then:.1f} → {now:.1f} "
            f"tokens): {NEVER_ALONE}.",
        )


def _both_ends(curve: Curve) -> tuple[float, float]:
    count = max(1, round(_ENDS * len(curve.values)))
    return float(curve.values[:count].mean()), float(curve.values[-count:].mean())


def of_evaluation(evaluation: Evaluation) -> Iterator[Finding]:
    """Students that repeat themselves, say little, or are close to the teacher only by KL."""
    for name in evaluation.content.suite.sets:
        for model in evaluation.students:
            yield from _worn_text(evaluation, model, name)
        for one, other in permutations(evaluation.students, 2):
            kl, rouge = (evaluation.difference(one, other, name, key) for key in ("reverse_kl", "rouge_l"))
            if kl and rouge and kl.high < 0 and rouge.high < 0:
                yield Finding(
                    one,
                    f"on {name} it has a lower KL(q‖p) than {other} ({_signed(kl.value, 3)}), but a lower Rouge-L too "
                    f"({_signed(rouge.value, 1)}): {NEVER_ALONE}.",
                )


def _worn_text(evaluation: Evaluation, model: str, name: str) -> Iterator[Finding]:
    repeated = evaluation.figure(model, name, "repetition")
    if repeated and repeated.low > _REPEATED:
        text = f"of its 4-grams on {name} {repeated.value:.0%} stood before in the same response."
        yield Finding(model, text.replace("%", " %"))
    length, usual = evaluation.figure(model, name, "length"), evaluation.figure(TEACHER, name, "length")
    if length and usual and length.high < _COLLAPSED * usual.value:
        yield Finding(
            model, f"its responses to {name} have {length.value:.1f} tokens, those of the teacher {usual.value:.1f}."
        )


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
