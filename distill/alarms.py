"""What is worth a warning though every number is finite: a loss that leaps, responses that shrink or repeat themselves.

A pure function of a step's figures and of what earlier ones were: all ranks and a resumed run warn alike.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from distill.config import FaultSettings

Memory = dict[str, float]

# Steps of a kind before a leap of its loss can be told, and those that the running moments reach back to.
_WARM_UP, _REACH = 20, 50
# What a leap must be besides: a smooth loss has so small a deviation that any bend would be many of it.
_LEAP = 1.25
# Rounds that tell how long responses were, and the share of them that must have ended by themselves: a student that
# rambles to the length limit says nothing of how long they should be.
_YARDSTICK, _ENDED = 3, 0.5
# Steps of silence after a warning of a kind.
_SILENCE = 50


class Alarm(NamedTuple):
    """One warning."""

    title: str
    text: str


def look(
    figures: Mapping[str, float], memory: Mapping[str, float], settings: FaultSettings, step: int
) -> tuple[list[Alarm], Memory]:
    """What to warn of after the sound step `step`, and the memory for the next."""
    kept = dict(memory)
    found = [_loss_spike(figures, kept, settings.loss_spike)]
    if "rollout/distinct_4" in figures:  # a round was sampled
        found += [_short(figures, kept, settings.min_length), _repeating(figures, settings.min_distinct)]
    alarms = []
    for alarm in filter(None, found):
        last = kept.get(f"warned {alarm.title}")
        if last is None or step - last > _SILENCE:
            kept[f"warned {alarm.title}"] = step
            alarms.append(alarm)
    return alarms, kept


def _loss_spike(figures: Mapping[str, float], memory: Memory, deviations: float) -> Alarm | None:
    """A policy gradient's loss is noise around 0; the divergence that it lowers is watched in its place.

    Steps on sampled and on recorded responses have losses of their own.
    """
    name = "student/reverse_kl" if "student/reverse_kl" in figures else "loss/total"
    value = figures[name]
    if not math.isfinite(value):
        return None
    kind = f"{name} sampled" if "rollout/response_length" in figures else f"{name} recorded"
    count, mean, variance = (memory.get(f"{kind} {moment}", 0.0) for moment in ("count", "mean", "variance"))
    bound = max(mean + deviations * math.sqrt(variance), _LEAP * mean)
    spikes = bool(deviations) and count >= _WARM_UP and value > bound
    usual = f"its running mean is {mean:.4g}, the bound {bound:.4g} (fault.loss_spike)"
    # A leap takes part as if it had stayed within the bound: one outlier must not hide the next.
    delta = (bound if spikes else value) - mean
    weight = max(1 / (count + 1), 1 / _REACH)
    mean, variance = mean + weight * delta, (1 - weight) * (variance + weight * delta**2)
    memory |= {f"{kind} count": count + 1, f"{kind} mean": mean, f"{kind} variance": variance}
    return Alarm("Loss spike", f"{name} leapt to {value:.4g}: {usual}") if spikes else None


def _short(figures: Mapping[str, float], memory: Memory, share: float) -> Alarm | None:
    length, rounds = figures["rollout/response_length"], memory.get("rounds", 0.0)
    if rounds < _YARDSTICK:
        if figures["rollout/eos_rate"] >= _ENDED:
            memory["length"] = (memory.get("length", 0.0) * rounds + length) / (rounds + 1)
            memory["rounds"] = rounds + 1
        return None
    if length >= share * memory["length"]:
        return None
    usual = f"{memory['length']:.1f} in the first rounds, the bound is {share:g} of that (fault.min_length)"
    return Alarm("Length collapse", f"responses have {length:.1f} tokens on average: {usual}")


def _repeating(figures: Mapping[str, float], bound: float) -> Alarm | None:
    distinct = figures["rollout/distinct_4"]
    if distinct >= bound:
        return None
    text = f"of a response's 4-grams only {distinct:.2f} are distinct: the bound is {bound:g} (fault.min_distinct)"
    return Alarm("Repetitive responses", text)
