"""Wall times of things that are to be compared, taken in turn so that a busy machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

from deepspeed.accelerator import get_accelerator

Times = dict[str, list[float]]


def interleaved(variants: Mapping[str, Callable[[], object]], repeats: int) -> Times:
    """Seconds of `repeats` calls of each variant, round after round; a first round of warm-up is not counted."""
    times: Times = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, call in variants.items():
            took = seconds(call)
            if repeat:
                times[name].append(took)
    return times


def seconds(call: Callable[[], object]) -> float:
    """One call, the accelerator's work included."""
    accelerator = get_accelerator()
    accelerator.synchronize()
    started = time.perf_counter()
    call()
    accelerator.synchronize()
    return time.perf_counter() - started


def ratio(times: Times, above: str, below: str) -> dict[str, float]:
    """`ABOVE_over_BELOW`: median of the ratios within a round, and half the distance between their quartiles."""
    ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
    name = f"{above}_over_{below}"
    return {name: statistics.median(ratios), f"{name}_spread": spread(ratios)}


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
