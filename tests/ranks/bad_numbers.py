"""Run by the DeepSpeed launcher from test_bad_numbers.py: steps of which some go bad on one rank, many runs in turn.

deepspeed --num_accelerators N tests/ranks/bad_numbers.py --local_rank=K CONFIG JOBS

JOBS is a JSON list of {"out": PATH, "overrides": [section.key=value, …], "steps": N, "bad": {STEP: QUANTITY},
"without": bool}, all of one tensor-parallel degree. `without` leaves the bad steps out altogether.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.config import Config, load
from distill.console import leave, quiet_libraries
from distill.engine import Engine
from distill.errors import Ended
from distill.topology import Topology, start, stop
from distill.trainer import Run

BAD_RANK = 1


def main() -> None:
    config_path, jobs_path = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    jobs = json.loads(Path(jobs_path).read_text())
    configs = [load(config_path, job["overrides"]) for job in jobs]
    # Processors without instructions for it compute in fp16 too, only slowly.
    get_accelerator().is_fp16_supported = lambda: True
    topology = start(configs[0].tensor_parallel)
    for job, config in zip(jobs, configs, strict=True):
        found = topology.gather_objects(take(config, job, topology))
        if topology.is_writer:
            Path(f"{job['out']}.json").write_text(json.dumps(found))
    stop()


def take(config: Config, job: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """The job's steps: their figures, and what the student was after each."""
    run = Run(config, topology)
    bad, steps, ended = job.get("bad", {}), [], None
    states = [state_of(run.student)]
    for step in range(run.state.step, job["steps"]):
        quantity = bad.get(str(step))
        if quantity and job.get("without"):
            leave_out(run)
        else:
            with BREAK[quantity](run) if quantity and topology.rank == BAD_RANK else sound():
                figures = run.step()
            run.log(figures)
            steps.append(figures)
            try:
                run.heed(figures)
            except Ended as end:
                ended = [end.code, str(end)]
        states.append(state_of(run.student))
        if ended:
            break
        run.maybe_save()
    if not ended:
        run.saver.finish()
        run.telemetry.close()
    return {"figures": steps, "states": states, "ended": ended, "memory": run.bad_steps.memory | run.objective.memory}


def leave_out(run: Run) -> None:
    """The step's rollouts are sampled, for the steps after it; its update never was."""
    run.source.minibatch(run.state.step)
    run.student._ds.lr_scheduler.step()
    run.state = replace(run.state, step=run.state.step + 1)


def state_of(engine: Engine) -> str:
    """A digest of this rank's weights and of the optimizer's state, its own count of steps included."""
    digest = hashlib.sha256()
    optimizer = getattr(engine._ds.optimizer, "optimizer", engine._ds.optimizer)
    held: list[Any] = [getattr(weight, "ds_tensor", weight) for weight in engine.module.parameters()]
    for group in optimizer.param_groups:
        for weight in group["params"]:
            held += [weight, *(value for _, value in sorted(optimizer.state[weight].items()))]
    for value in held:
        digest.update(torch.as_tensor(value).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def sound() -> Iterator[None]:
    yield


@contextmanager
def bad_loss(run: Run) -> Iterator[None]:
    """Of the first micro-batch; its gradient is as ever."""
    plain, count = run.objective.loss, iter([torch.nan])

    def loss(*given: Any) -> Any:
        terms = plain(*given)
        return replace(terms, total=terms.total + next(count, 0.0))

    run.objective.loss = loss
    yield
    run.objective.loss = plain


@contextmanager
def bad_reward(run: Run) -> Iterator[None]:
    """Of one token, of whose text all other tokens' advantages are made."""
    plain = run.objective._rewards

    def rewards(batch: Any) -> Any:
        values = plain(batch)
        values[0, 0] = torch.nan
        return values

    run.objective._rewards = rewards
    yield
    run.objective._rewards = plain


@contextmanager
def bad_teacher(run: Run) -> Iterator[None]:
    """One logit of the last token of every micro-batch."""
    plain = run.teacher.logits

    @contextmanager
    def logits(batch: Any) -> Iterator[Any]:
        last = int(batch.response_lengths.sum()) - 1
        with plain(batch) as each:

            def broken(tokens: slice) -> Any:
                values = each(tokens).clone()
                if tokens.start <= last < tokens.stop:
                    values[last - tokens.start, 7] = torch.nan
                return values

            yield broken

    run.teacher.logits = logits
    yield
    run.teacher.logits = plain


@contextmanager
def bad_gradient(run: Run) -> Iterator[None]:
    """Of one weight, which tensor parallelism leaves whole."""
    *_, weight = run.student.module.parameters()
    hook = weight.register_hook(lambda gradient: gradient.clone().fill_(torch.inf))
    yield
    hook.remove()


BREAK = {"loss": bad_loss, "reward": bad_reward, "teacher": bad_teacher, "gradient": bad_gradient}


main()
leave(0)
