"""One model's responses and scores: what of them is missing is made, what is there is kept."""

import gc
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.engine import Engine
from distill.evaluation.answers import Answer, AnswerFile, answer
from distill.evaluation.frozen import let_go, load_frozen
from distill.evaluation.prompt_sets import PromptSet
from distill.evaluation.reading import ALONE, TO_TEACHER, Row, Values, read
from distill.evaluation.scores import Scores, Tokens
from distill.evaluation.subjects import Subject
from distill.evaluation.suite import Suite
from distill.evaluation.text import exact_match, repetition, rouge_l
from distill.rollout.ends import EndIds
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology

# Raised whenever a figure of a row is defined anew: scores of before are then made again.
_FORM = 1


class Measurement:
    """Of `subject`; `teacher` is that of the teacher, which is its own."""

    def __init__(
        self,
        suite: Suite,
        subject: Subject,
        teacher: "Measurement | None",
        out: Path,
        dtype: torch.dtype,
        topology: Topology,
    ):
        self.suite, self.subject, self.out, self.dtype, self.topology = suite, subject, out, dtype, topology
        self.teacher = self if subject.is_teacher else teacher

    def run(self) -> None:
        """Make what is missing. Collective."""
        for name, prompts in self.subject.sets.prompts.items():
            for seed in self.suite.seeds:
                self._answer(name, prompts, seed)
            self._keep(name, lambda name=name, prompts=prompts: self._score(name, prompts))  # type: ignore[misc]
        for name, questions in self.subject.sets.choices.items():
            self._keep(name, lambda name=name, rows=questions.rows: self._read_alone(name, rows))  # type: ignore[misc]
        for name, text in self.subject.sets.texts.items():
            self._keep(name, lambda name=name, rows=text.rows: self._read_alone(name, rows))  # type: ignore[misc]
        engine = None if self.subject.is_teacher else self.__dict__.pop("engine", None)
        if engine is not None:
            let_go(engine)
            del engine
            gc.collect()  # the next model takes its place in memory

    @cached_property
    def engine(self) -> Engine:
        """Loaded when it is first needed. Collective."""
        return load_frozen(self.subject.settings, self.subject.vocabulary, self.topology, self.dtype)

    def answers(self, name: str, seed: int) -> list[Answer]:
        """Responses to a set, in its order, once `run` has made them."""
        found = self._file(name, seed).complete()
        assert found is not None, f"{self._file(name, seed).path}: a row is gone"
        return found

    def scores(self, name: str) -> Scores:
        """Of a set, of choices or of a text, once `run` has made them."""
        found = Scores.load(self._scores_path(name), self._scores_origin(name))
        assert found is not None, f"{self._scores_path(name)}: gone"
        return found

    def _file(self, name: str, seed: int) -> AnswerFile:
        prompts, suite = self.subject.sets.prompts[name], self.suite
        origin = self.subject.origin | {
            "prompts": prompts.content,
            "seed": seed,
            "sampling": [suite.temperature, suite.top_k, suite.top_p, suite.max_new_tokens],
            "batch": suite.batch,
            "precision": str(self.dtype),
        }
        return AnswerFile(self.out / self.subject.name / f"{name}.seed-{seed}.jsonl", origin, len(prompts.prompts))

    def _answer(self, name: str, prompts: PromptSet, seed: int) -> None:
        file = self._file(name, seed)
        if file.agreed_complete(self.topology):
            return
        ends = EndIds(self.subject.vocabulary.eos_ids, self.topology.device)
        worker = RolloutWorker(self.engine, None, self.suite.sampling, ends, seed, self.topology)
        what = f"{self.subject.name}: {name}, seed {seed}"
        answer(worker, prompts, file, self.subject.vocabulary.tokenizer, self.topology, what)

    def _scores_path(self, name: str) -> Path:
        return self.out / self.subject.name / f"{name}.scores.safetensors"

    def _scores_origin(self, name: str) -> dict[str, Any]:
        if name not in self.subject.sets.prompts:
            content = {"content": self.subject.sets.content(name), "precision": str(self.dtype)}
            return self.subject.origin | content | {"form": _FORM, "measures": list(ALONE)}
        prompts = self.subject.sets.prompts[name]
        teacher = None if self.teacher is None else self.teacher.subject.origin
        of_seeds = [self._file(name, seed).origin for seed in self.suite.seeds]
        compared = self.suite.compared_seeds
        figures = {"form": _FORM, "measures": list(TO_TEACHER), "compared": compared}
        return {"answers": of_seeds, "references": prompts.references_hash, "teacher": teacher} | figures

    def _keep(self, name: str, make: Callable[[], Scores]) -> None:
        path, origin = self._scores_path(name), self._scores_origin(name)
        there = Scores.load(path, origin) is not None
        if self.topology.max_over_ranks(float(not there)) == 0:
            return
        scores = make()
        if self.topology.is_writer:
            scores.save(path, origin)
        self.topology.barrier()

    def _read_alone(self, name: str, rows: list[Row]) -> Scores:
        values = read([self.engine], rows, ALONE, self.suite.micro_batch, self.topology, f"{self.subject.name}: {name}")
        return Scores(own=Tokens.of(values))

    def _score(self, name: str, prompts: PromptSet) -> Scores:
        answers = [self.answers(name, seed) for seed in self.suite.seeds]
        scores = Scores(self._text_figures(prompts, answers))
        if self.teacher is not None and self.suite.compared_seeds:
            scores.own = Tokens.of(self._read_beside_teacher(name, prompts, self))
            of_teacher = self.teacher is self
            scores.taught = (
                scores.own if of_teacher else Tokens.of(self._read_beside_teacher(name, prompts, self.teacher))
            )
        return scores

    def _read_beside_teacher(self, name: str, prompts: PromptSet, writer: "Measurement") -> Values:
        """Of the responses that `writer` gave, of the compared seeds one after the other."""
        assert self.teacher is not None
        rows: list[Row] = [
            (prompts.prompt_ids[answer.row], answer.ids)
            for seed in self.suite.seeds[: self.suite.compared_seeds]
            for answer in writer.answers(name, seed)
        ]
        engines, what = (
            [self.engine, self.teacher.engine],
            f"{self.subject.name}: reading {name} of {writer.subject.name}",
        )
        return read(engines, rows, TO_TEACHER, self.suite.micro_batch, self.topology, what)

    def _text_figures(self, prompts: PromptSet, answers: list[list[Answer]]) -> dict[str, np.ndarray]:
        """[seeds, rows] each; every rank takes a share of the rows, all have all."""
        world, rank = self.topology.world_size, self.topology.rank
        count = len(prompts.prompts)
        mine = {
            (seed, row): _figures(answers[seed][row], prompts.references[row])
            for seed in range(len(answers))
            for row in range(rank, count, world)
        }
        everyone = {place: figures for part in self.topology.gather_objects(mine) for place, figures in part.items()}
        names = everyone[0, 0]
        return {
            name: np.array([[everyone[seed, row][name] for row in range(count)] for seed in range(len(answers))])
            for name in names
        }


def _figures(answer: Answer, references: list[str]) -> dict[str, float]:
    found = {
        "length": float(len(answer.ids)),
        "repetition": repetition(answer.ids),
        "ended": float(answer.ended),
    }
    if references:
        found["rouge_l"] = rouge_l(answer.text, references)
        found["exact_match"] = exact_match(answer.text, references)
    return found
