"""Validation during training: the figure by which the best student is kept."""

from transformers import PreTrainedTokenizerBase

from distill.config import Config
from distill.data.loading import InstructionRecords
from distill.engine import Engine
from distill.evaluation.fidelity import ON_STUDENT_TEXT, compare, mean_cross_entropy
from distill.evaluation.generation import respond, share, text_figures
from distill.rollout.ends import Ends
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology


class Validation:
    """Validation loss where there is no teacher; else Rouge-L of the student's samples, and its KL to the teacher."""

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
        self.worker = RolloutWorker(student, teacher, alone, ends, config.run.seed, topology, keep_hidden=True)

    def run(self) -> tuple[dict[str, float], float]:
        """`valid/…` figures, and the one to maximise. Collective."""
        if self.teacher is None:
            loss = self.loss()
            return {"valid/loss": loss}, -loss
        show = self.topology.is_writer
        # Always the same draws (round 0), so that two validations differ by the student alone.
        prompts = self.records.batch(self.share.indices)
        rollouts = respond(self.worker, prompts, self.share.indices, 0, "validation", show)
        references = self.records.references(self.share.indices)
        figures, _ = text_figures(rollouts, references, self.tokenizer, self.share.counted, self.topology)
        mask = rollouts.response_mask
        assert rollouts.student_hidden is not None
        assert rollouts.teacher_hidden is not None
        hidden = rollouts.student_hidden[mask], rollouts.teacher_hidden[mask]
        figures |= compare(self.student, self.teacher, *hidden, ON_STUDENT_TEXT, self.topology)
        return {f"valid/{name}": value for name, value in figures.items()}, figures["rouge_l"]

    def loss(self) -> float:
        """−log q per token of the recorded responses. Collective."""
        self.student.train(False)
        batch = self.records.batch(self.share.indices)
        return mean_cross_entropy(self.student, batch, self.share.counted, self.config.optim.micro_batch, self.topology)
