"""The training loop: minibatch → update → log → validate → save."""

import math
import time
from dataclasses import replace

import torch

from distill import alarms, objectives
from distill.assembly import load_models, open_source
from distill.bad_numbers import BadSteps, Skipped
from distill.checkpoint.catalog import CHECKPOINTS, RunState, candidates, tag_of
from distill.checkpoint.claim import claim
from distill.checkpoint.disk import replace_file
from distill.checkpoint.restoring import Restorer, contents_of
from distill.checkpoint.saving import Saver
from distill.checkpoint.students import recover_student, write_student
from distill.config import RESOLVED, Config, dump
from distill.dashboards.glimpse import as_text
from distill.data.loading import open_plain_text
from distill.errors import EXIT_BAD_NUMBERS, EXIT_FAILED, EXIT_PREEMPTED, Ended
from distill.evaluation.selection import Selection
from distill.evaluation.validation import Validation
from distill.host import peak_memory_gib, ranks_on_host
from distill.model_card import model_card
from distill.objective_settings import MiniLLMSettings
from distill.preemption import notice
from distill.sources import RecordedSource, Source
from distill.telemetry import Stopwatch, Telemetry, warn
from distill.topology import Topology
from distill.update import Updater
from distill.vigil.words import resume
from distill.whereabouts import here


def train(config: Config, topology: Topology) -> None:
    """Run `config` to its last step, from its last checkpoint if it has one. Collective over all ranks."""
    claim(config.run.folder, topology)
    run = Run(config, topology)
    notice.heeded = True  # from now on what there is can be saved
    while not run.done:
        figures = run.step()
        run.log(figures)
        run.heed(figures)
        run.maybe_validate()
        run.maybe_save()
        run.maybe_leave()
    run.finish()


class Run:
    """Everything a run holds between steps."""

    def __init__(self, config: Config, topology: Topology):
        """`topology` has `config.tensor_parallel` ranks a replica: the teacher's grid, `grid`. `topology` as kept is
        the student's."""
        if topology.tp_size != config.tensor_parallel:
            raise ValueError(f"{topology.tp_size} ranks a replica, the run is for {config.tensor_parallel}")
        self.config, self.watch, self.grid = config, Stopwatch(), topology
        # Every rank has the whole of a small student, of a teacher a part.
        apart = config.parallel.student_tp < topology.tp_size
        self.topology = topology = topology.each_alone if apart else topology
        self.folder = config.run.folder
        if topology.is_writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            recover_student(self.folder)
            replace_file(self.folder / RESOLVED, dump(config).encode())
        topology.barrier()
        # Dropout's masks; data order, coins and token draws have streams of their own.
        torch.manual_seed(config.run.seed * 2**16 + topology.dp_rank)
        self.objective = objectives.build(config.objective)
        models = load_models(config, topology, self.grid)
        self.tokenizer, self.student, self.teacher = models.tokenizer, models.student, models.teacher
        self.validation: Validation | None = None
        if config.data.valid:
            # Ranks that share a teacher decode together if it takes part.
            theirs = self.grid if models.alike else topology
            self.validation = Validation(config, self.student, models.alike, self.tokenizer, models.ends, theirs)
        self.selection = Selection.of(config)
        self.selected: dict[str, float] = {}
        """What choosing the best student has to remember; a checkpoint keeps it."""
        self.source = open_source(config, models, self.validation, lambda: self.progress)
        self.plain_text: Source | None = None
        if config.data.plain_text and isinstance(config.objective, MiniLLMSettings):
            texts = open_plain_text(config.data.plain_text, "data.plain_text")
            self.plain_text = RecordedSource(texts, config, topology)
        given = (self.objective, self.student, self.teacher, topology, self.watch)
        self.updater = Updater(*given, dropout=config.optim.dropout)
        self.bad_steps = BadSteps(self.folder, self.tokenizer, topology, self.student.loss_scale)
        self.skipped: Skipped | None = None
        self.heeded: dict[str, float] = {}
        """What the alarms know of earlier steps; a checkpoint keeps it."""
        self.saver = Saver(self.folder, topology, ranks_on_host(), config.checkpoint.keep, warn)
        self.told_to_stop = False
        self.tokens = 0.0
        """Response tokens of the steps so far, over all ranks; a checkpoint keeps it."""
        with here.within("resume"):
            self.state = self._resume()
        self.telemetry = Telemetry(config, topology.is_writer, self.state.step)
        if self.state.step:
            self.telemetry.say(f"resumed {self.folder} at step {self.state.step}")

    def _resume(self) -> RunState:
        restorer = Restorer(self.folder, self.topology, warn)
        found = restorer.newest()
        if found is None:
            return RunState()
        # Where the layout is another there is no state of these ranks' generators: dropout's masks must not come again.
        torch.manual_seed((self.config.run.seed * 2**16 + self.topology.dp_rank + (found.state.step << 40)) % 2**63)
        rollouts = restorer.restore(found, self.student)
        self.saver.saved = found.tag
        self.source.resume(rollouts, found.state.memory.get("source", {}))
        self.objective.memory = found.state.memory.get("objective", {})
        self.updater.memory = found.state.memory.get("updater", {})
        self.bad_steps.memory = found.state.memory.get("bad_steps", {})
        self.heeded = found.state.memory.get("alarms", {})
        self.selected = found.state.memory.get("selection", {})
        self.tokens = found.state.memory.get("tokens", {}).get("total", 0.0)
        return found.state

    @property
    def progress(self) -> float:
        """Share of the step or time budget that is used up; the same on every rank."""
        optim, state = self.config.optim, self.state
        timed = state.seconds / (optim.max_minutes * 60) if optim.max_minutes else 0.0
        return min(max(state.step / optim.steps, timed), 1.0)

    @property
    def done(self) -> bool:
        """Whether the step or time budget is used up, or patience; the same answer on every rank."""
        return self.progress >= 1 or self.cut_short is not None

    @property
    def cut_short(self) -> str | None:
        """Why the run is over before its budget is, if so; the same answer on every rank."""
        return self.selection.verdict(self.selected) if self.progress < 1 else None

    def step(self) -> dict[str, float]:
        """One optimizer step, rollouts included where a round starts; its figures."""
        started = time.perf_counter()
        step = self.state.step
        here.step, here.phase = step + 1, ""
        with self.watch.phase("minibatch"):
            micro_batches = self.source.minibatch(step)
            plain_text = self.plain_text.minibatch(step) if self.plain_text else []
        figures = self.updater.step(micro_batches, plain_text, self.source.fresh)
        self.skipped = self.bad_steps.note(step + 1, self.updater.suspects)
        figures |= self.bad_steps.figures()
        figures |= {f"adaptive/{name}": value for name, value in (self.source.memory | self.objective.memory).items()}
        # The slowest rank's clock is everyone's: all must agree when the time is up.
        given = [time.perf_counter() - started, float(self.saver.writing), float(notice.told)]
        seconds, writing, told = self.topology.max_of_each(given)
        self.told_to_stop = told > 0
        if self.saver.busy and not writing:
            self.telemetry.flush()
            self.saver.finish()
        self.state = replace(self.state, step=step + 1, seconds=self.state.seconds + seconds)
        if self.updater.suspects is None:
            self.objective.memory = self.objective.advance(figures, self.progress)
        figures["time/step"] = seconds
        figures["tokens/per_second"] = figures["tokens/response"] / seconds
        self.tokens += figures["tokens/response"]
        return figures | self._spent()

    def _spent(self) -> dict[str, float]:
        """What the run has cost so far: seconds of training and response tokens."""
        return {"time/total": self.state.seconds, "tokens/total": self.tokens}

    def log(self, figures: dict[str, float]) -> None:
        """Write the step's record, and example rollouts where a round was sampled."""
        phases = self.watch.lap()
        self.telemetry.advance(self.state.step, self.state.seconds)
        step, config = self.state.step, self.config
        if step % config.log.every == 0 or self.done:
            memory = {"memory/peak_gib": self.topology.max_over_ranks(peak_memory_gib())}
            self.telemetry.log(step, figures | phases | memory)
        if self.topology.is_writer and (fresh := self.source.fresh) is not None:
            self.telemetry.samples(step, as_text(fresh, config.log.samples, self.tokenizer), fresh)

    def heed(self, figures: dict[str, float]) -> None:
        """Warn of what looks wrong; end a run whose numbers stay bad.

        Raises:
            Ended: on every rank, after too many skipped steps in a row.
        """
        settings, bad = self.config.fault, self.bad_steps
        if self.skipped:
            self.telemetry.alert("Step skipped", str(self.skipped))
        elif self.updater.suspects is None:
            found, self.heeded = alarms.look(figures, self.heeded, settings, self.state.step)
            for alarm in found:
                self.telemetry.alert(alarm.title, f"step {self.state.step}: {alarm.text}")
        if self.skipped and bad.in_a_row > settings.max_bad_steps:
            self.telemetry.close()
            self.saver.finish()
            tags = self.topology.gather_objects(candidates(self.folder / CHECKPOINTS))[0]
            where = f"the last good checkpoint is {tags[0]} in {self.folder}" if tags else "there is no checkpoint yet"
            many = f"{bad.in_a_row} steps in a row, more than fault.max_bad_steps = {settings.max_bad_steps}"
            raise Ended(EXIT_BAD_NUMBERS, f"{self.skipped}; {many}; {where}")

    def maybe_validate(self) -> None:
        """Validate when it is time; keep the student if it is the best so far.

        Raises:
            Ended: it is the last, and cannot be written.
        """
        every = self.config.evaluation.every
        if self.validation is None or not (self.done or (every and self.state.step % every == 0)):
            return
        with here.within("validation"):
            figures = self.validation.run()
        score = self.selection.score(figures[self.selection.metric])
        figures = {f"valid/{name}": value for name, value in figures.items()}
        self.selected = self.selection.look(score, self.selected)
        self.telemetry.log(self.state.step, figures | self._spent())
        if self.selection.is_better(score, self.state.best):
            self._keep_student(score, figures)
        if self.cut_short:
            self.telemetry.conclude(self.state.step, self.cut_short)

    def _keep_student(self, score: float, figures: dict[str, float]) -> None:
        if (error := self._write_student(figures)) is None:
            self.state = replace(self.state, best=score, best_step=self.state.step)
        elif self.done:
            raise Ended(EXIT_FAILED, f"the student is not written: {error}; make room and start again")
        else:
            self._say_error(f"the best student so far is not written: {error}; the one before stays")

    def maybe_save(self) -> None:
        """Checkpoint when it is time, when the student is the best so far, at the end, and before leaving.

        Not after a skipped step: the rollouts in use may be the cause.
        """
        step = self.state.step
        due = self.told_to_stop or step % self.config.checkpoint.every == 0 or step == self.state.best_step
        if self.done or (due and not self.bad_steps.in_a_row):
            self.save()

    def save(self) -> None:
        """Begin a checkpoint; later steps finish it."""
        memory = {
            "source": self.source.memory,
            "objective": self.objective.memory,
            "updater": self.updater.memory,
            "bad_steps": self.bad_steps.memory,
            "alarms": self.heeded,
            "selection": self.selected,
            "tokens": {"total": self.tokens},
        }
        self.state = replace(self.state, memory=memory)
        with here.within("save"):
            self.telemetry.flush()
            self.saver.begin(self.state, contents_of(self.student, self.source.in_use(), self.topology.rank))

    def maybe_leave(self) -> None:
        """End here, once the checkpoint is one, if any rank was told to.

        Raises:
            Ended: on every rank.
        """
        if not self.told_to_stop or self.done:
            return
        self.saver.finish()
        self.telemetry.close()
        self.topology.barrier()  # a launcher may kill the others once the first has left
        step, newest = self.state.step, self.saver.saved
        stays = f"{newest} stays" if newest else "there is no checkpoint yet"
        told = f"saved at step {step}" if newest == tag_of(step) else f"not saved at step {step}; {stays}"
        raise Ended(EXIT_PREEMPTED, f"told to stop, {told}; {resume()}")

    def finish(self) -> None:
        """Without validation data the last student is the one to keep.

        Raises:
            Ended: it cannot be written.
        """
        self.saver.finish()
        if self.validation is None and (error := self._write_student({})) is not None:
            raise Ended(EXIT_FAILED, f"the student is not written: {error}; make room and start again")
        self._sum_up()
        self.telemetry.close()

    def _sum_up(self) -> None:
        state, early = self.state, self.cut_short
        facts: dict[str, float | str] = {"total/steps": state.step, "total/minutes": state.seconds / 60}
        facts |= {"total/tokens": self.tokens, "ended": early or "all its steps or minutes are done"}
        if state.best is not None and state.best_step is not None and math.isfinite(state.best):
            facts |= {f"best/{self.selection.metric}": self.selection.score(state.best), "best/step": state.best_step}
        self.telemetry.summarise(facts)
        why = f"; ended early: {early}" if early else ""
        self.telemetry.say(f"{self.folder}: {state.step} steps in {state.seconds / 60:.1f} min{why}")

    def _write_student(self, figures: dict[str, float]) -> str | None:
        with here.within("write student"):
            card = model_card(self.config, self.state.step, figures)
            return write_student(self.folder, self.student, self.tokenizer, card)

    def _say_error(self, text: str) -> None:
        if self.topology.is_writer:
            warn(text)
