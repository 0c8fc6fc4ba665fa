"""Validation during training: the figures by which the best student is kept."""

from collections import defaultdict

from transformers import PreTrainedTokenizerBase

from distill.config import Config
from distill.data.loading import InstructionRecords
from distill.engine import Engine
from distill.evaluation.fidelity import mean_cross_entropy, mean_reverse_kl
from distill.evaluation.generation import respond, share, text_figures
from distill.rollout.ends import Ends
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology


class Validation:
    """Rouge-L of the student's samples and their KL to the teacher, where one reads them, and validation loss: what
    the metric and the objective need."""

    def __init__(
        self,
        config: Config,
        student: Engine,
        teacher: Engine | None,
        tokenizer: PreTrainedTokenizerBase,
        ends: Ends,
        topology: Topology,
    ):
        assert config.data.valid is not None
        self.config, self.student, self.teacher = config, student, teacher
        self.tokenizer, self.topology = tokenizer, topology
        self.records = InstructionRecords(config.data.valid, "data.valid")
        self.share = share(min(len(self.records), config.evaluation.prompts), topology)
        # The student as it will be used: alone, at temperature 1. The teacher only scores what it wrote.
        alone = config.rollout.model_copy(
            update={"alpha": 0.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "teacher_cache": "device"}
        )
        keep_hidden = teacher is not None
        self.worker = RolloutWorker(student, teacher, alone, ends, config.run.seed, topology, keep_hidden)

    def run(self) -> dict[str, float]:
        """Its figures by name, `config.validation_metric` among them. Collective."""
        figures = self._of_samples() if self.config.validation_samples else {}
        if self.config.validation_metric == "loss":
            figures["loss"] = self.loss()
        return figures

    def _of_samples(self) -> dict[str, float]:
        """Means over the rounds. They have always the same draws, so that two validations differ by the student."""
        seeds, sums = self.config.evaluation.seeds, defaultdict[str, float](float)
        for round_index in range(seeds):
            for name, value in self._round(round_index).items():
                sums[name] += value
        return {name: value / seeds for name, value in sums.items()}

    def _round(self, round_index: int) -> dict[str, float]:
        """Of one response to each prompt."""
        prompts, show = self.records.batch(self.share.indices), self.topology.is_writer
        rollouts = respond(self.worker, prompts, self.share.indices, round_index, "validation", show)
        references = self.records.references(self.share.indices)
        figures, _ = text_figures(rollouts, references, self.tokenizer, self.share.counted, self.topology)
        if self.teacher is None:
            return figures
        mask = rollouts.response_mask.clone()
        mask[self.share.counted :] = False  # repeated to give each rank as many
        assert rollouts.student_hidden is not None
        assert rollouts.teacher_hidden is not None
        hidden = rollouts.student_hidden[mask], rollouts.teacher_hidden[mask]
        return figures | {"reverse_kl": mean_reverse_kl(self.student, self.teacher, *hidden, self.topology)}

    def loss(self) -> float:
        """−log q per token of the recorded responses. Collective."""
        self.student.train(False)
        batch = self.records.batch(self.share.indices)
        return mean_cross_entropy(self.student, batch, self.share.counted, self.config.optim.micro_batch, self.topology)
