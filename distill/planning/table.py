"""A plan for the terminal, and as JSON."""

from distill.planning.advice import Advice
from distill.planning.memory import activation_bytes, gathers_once
from distill.planning.plan import Plan
from distill.planning.setup import GIB

_HEADER = {"rollouts": "rollouts", "loss": "forward, backward", "update": "update"}
_WIDTH = 28


def describe(plan: Plan, knobs: list[Advice], choices: list[Advice]) -> str:
    """Everything, line by line."""
    parts = [_run(plan), _memory(plan), _traffic(plan), _time(plan), verdict(plan), _choices(choices)]
    return "\n\n".join([*parts, *([_knobs(knobs)] if knobs else [])])


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    limit = plan.setup.cluster.memory
    found = f"{_gib(plan.memory.peak)} of {_gib(limit)} GiB in the fullest phase ({_HEADER[plan.memory.fullest]})"
    if plan.fits:
        return f"fits: {found}, {_gib(plan.margin)} GiB ({plan.margin / limit:.0%}) to spare"
    return f"does not fit: {found}, {_gib(-plan.margin)} GiB too much"


def as_json(plan: Plan, knobs: list[Advice], choices: list[Advice]) -> dict[str, object]:
    """The same for programs: bytes and seconds."""
    memory, duration = plan.memory, plan.duration
    return {
        "fits": plan.fits,
        "peak_bytes": memory.peak,
        "margin_bytes": plan.margin,
        "state_bytes": memory.state,
        "phase_bytes": memory.phases,
        "activation_bytes": {
            "kept": activation_bytes(plan.setup, False),
            "recomputed": activation_bytes(plan.setup, True),
        },
        "host_bytes_per_node": plan.host_per_node,
        "sent_bytes": {f"{flow.phase}: {flow.name} ({flow.within})": flow.sent for flow in plan.traffic},
        "sent_bytes_per_step": plan.sent_per_step,
        "seconds": vars(duration),
        "deepspeed": [_advice_as_json(advice) for advice in choices],
        "knobs": [_advice_as_json(advice) for advice in knobs],
    }


def _advice_as_json(advice: Advice) -> dict[str, object]:
    plan = advice.plan
    return {
        "overrides": list(advice.overrides),
        "fits": plan.fits,
        "peak_bytes": plan.memory.peak,
        "host_bytes_per_node": plan.host_per_node,
        "seconds_per_step": plan.duration.step,
    }


def _run(plan: Plan) -> str:
    setup = plan.setup
    models = [f"student {setup.student.parameters / 1e9:.2f}B"]
    if setup.teacher:
        models.append(f"teacher {setup.teacher.parameters / 1e9:.2f}B")
    lengths = f"prompts up to {setup.prompt} tokens, sequences up to {setup.length}"
    if setup.assumed_lengths:
        lengths += " (assumed: there are no records at data.train yet)"
    if setup.samples and setup.zero.stage == 3:
        lengths += f"; sampling with weights {'gathered once' if gathers_once(setup) else 'fetched layer by layer'}"
    cluster = setup.cluster
    where = f"{cluster.nodes} × {cluster.per_node} {'GPUs' if cluster.device == 'cuda' else 'CPU ranks'}"
    layout = f"{setup.dp} replicas × {setup.student.tp} tensor-parallel ranks, ZeRO stage {setup.zero.stage}"
    if setup.cohort > 1:
        layout += f"; the teacher over {setup.teacher.tp if setup.teacher else 1} ranks"
    precision = str(setup.dtype).removeprefix("torch.")
    return f"{', '.join(models)}, {precision}; {where}: {layout}\n{lengths}"


def _memory(plan: Plan) -> str:
    memory = plan.memory
    phases = list(memory.phases)
    lines = [f"GiB on each {_rank(plan)}".ljust(_WIDTH) + "".join(_HEADER[phase].rjust(19) for phase in phases)]
    for name, size in memory.state.items():
        lines.append(name.ljust(_WIDTH) + _gib(size).rjust(19) * len(phases))
    for name in dict.fromkeys(name for phase in phases for name in memory.phases[phase]):
        sizes = [memory.phases[phase].get(name) for phase in phases]
        lines.append(name.ljust(_WIDTH) + "".join(("" if size is None else _gib(size)).rjust(19) for size in sizes))
    lines.append("together".ljust(_WIDTH) + "".join(_gib(memory.of(phase)).rjust(19) for phase in phases))
    kept, recomputed = (activation_bytes(plan.setup, checkpointing) for checkpointing in (False, True))
    lines.append(
        f"activations of a micro-batch: {_gib(kept)}, recomputed in backward (checkpointing) {_gib(recomputed)}"
    )
    if memory.host:
        lines.append(f"in each node's memory, offloaded: {_gib(plan.host_per_node)} GiB")
    return "\n".join(lines)


def _traffic(plan: Plan) -> str:
    lines = [f"sent by each {_rank(plan)}, GiB"]
    for flow in plan.traffic:
        when = "a round" if flow.phase == "rollouts" else "a step"
        lines.append(f"{_HEADER[flow.phase]}: {flow.name}".ljust(48) + f"{_gib(flow.sent).rjust(10)}  {when}")
    lines.append("together".ljust(48) + f"{_gib(plan.sent_per_step).rjust(10)}  a step, its share of a round included")
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    times = plan.duration
    rounds = plan.setup.feed.rounds
    sampled = f"a round {times.round:.1f} s every {1 / rounds:.3g} steps, " if rounds else ""
    return (
        f"estimated: {sampled}forward and backward {times.loss:.2f} s, update {times.update:.2f} s; "
        f"a step {times.step:.2f} s, {plan.setup.config.optim.steps} steps "
        f"{times.step * plan.setup.config.optim.steps / 3600:.1f} h"
    )


def _choices(choices: list[Advice]) -> str:
    suits = choices[0] if choices and choices[0].plan.fits else None
    title = f"of the shipped DeepSpeed configs {_value(suits)} suits" if suits else "no shipped DeepSpeed config fits"
    return "\n".join([title, *(_line(_value(advice), advice) for advice in choices)])


def _value(advice: Advice) -> str:
    return advice.overrides[0].partition("=")[2]


def _knobs(knobs: list[Advice]) -> str:
    lines = ["what to turn, by effect"]
    return "\n".join([*lines, *(_line(" ".join(advice.overrides), advice) for advice in knobs)])


def _line(name: str, advice: Advice) -> str:
    plan = advice.plan
    host = f", host {_gib(plan.host_per_node)} GiB a node" if plan.memory.host else ""
    fits = "fits" if plan.fits else "does not fit"
    return f"  {name.ljust(54)} {_gib(plan.memory.peak).rjust(8)} GiB, {fits}, {plan.duration.step:.2f} s a step{host}"


def _rank(plan: Plan) -> str:
    return "GPU" if plan.setup.cluster.device == "cuda" else "rank"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
