"""Whether the learning rate can come to its peak, and to its end."""

from distill.checks.report import Report
from distill.config import Config
from distill.optim import learning_rate_factor


def note_on_schedule(config: Config, report: Report) -> None:
    """Tell of a warm-up that outlasts the run, and of a falling rate in a run that may end by the clock.

    Both may be meant, as in a trial of a few steps; nobody would see them in the figures of one.
    """
    optim = config.optim
    if optim.warmup_steps >= optim.steps:
        most = learning_rate_factor(optim.steps - 1, optim)
        told = f"the run has {optim.steps} steps; its learning rate rises to {most:.0%} of optim.lr and no further"
        report.notices.append(f"optim.warmup_steps = {optim.warmup_steps}: {told}")
    if optim.max_minutes is not None and optim.schedule != "constant":
        told = f"it goes by steps; where optim.max_minutes = {optim.max_minutes:g} ends the run before its last step"
        report.notices.append(f"optim.schedule = {optim.schedule!r}: {told}, the learning rate has not fallen to 0")
