"""The held-out comparison of students with their teacher: text and distributions, one row of figures a model."""

import json
from pathlib import Path
from statistics import fmean

from distill.config import ModelSettings, RolloutSettings
from distill.data.batches import Rollouts
from distill.data.loading import InstructionRecords
from distill.data.records import fingerprint, read_manifest
from distill.engine import Engine
from distill.errors import BadInput, Problem
from distill.evaluation.fidelity import ON_STUDENT_TEXT, ON_TEACHER_TEXT, compare, final_hidden
from distill.evaluation.frozen import Vocabulary, common_vocabulary, load_frozen
from distill.evaluation.generation import Share, respond, share, text_figures
from distill.rollout.ends import EndIds
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology, start

Figures = dict[str, float]


class Evaluation:
    """Fixed prompts, references, seeds and teacher samples, on which every model is measured alike."""

    def __init__(
        self,
        teacher: ModelSettings,
        vocabulary: Vocabulary,
        records: InstructionRecords,
        settings: RolloutSettings,
        seeds: int,
        micro_batch: int,
        topology: Topology,
    ):
        self.vocabulary = vocabulary
        self.records, self.settings, self.seeds = records, settings, seeds
        self.micro_batch, self.topology = micro_batch, topology
        self.share: Share = share(len(records), topology)
        self.teacher_path = teacher.path
        self.teacher = load_frozen(teacher, self.vocabulary, topology)
        self.teacher_samples = self._sample(self.teacher, None, "teacher", 0)

    def measure(self, name: str, model: ModelSettings) -> tuple[Figures, list[str]]:
        """Figures of one model, and this rank's responses of the first seed.

        `rouge_l`, `mean_length`, `repetition` and `ended` come from the model's own samples, averaged over the seeds;
        `reverse_kl` from those of the first seed; `forward_kl` and `top1_agreement` from the teacher's samples.
        Collective.
        """
        itself = model.path == self.teacher_path
        engine = self.teacher if itself else load_frozen(model, self.vocabulary, self.topology)
        references = self.records.references(self.share.indices)
        # A response has dozens of tokens to compare distributions at, but is one text: the teacher scores one seed.
        first = self.teacher_samples if itself else self._sample(engine, self.teacher, name, 0)
        samples = [first, *(self._sample(engine, None, name, seed) for seed in range(1, self.seeds))]
        tokenizer, counted = self.vocabulary.tokenizer, self.share.counted
        texts = [text_figures(rollouts, references, tokenizer, counted, self.topology) for rollouts in samples]
        runs = [figures for figures, _ in texts]
        mean = {key: fmean(run[key] for run in runs) for key in runs[0]}
        mean |= self._compare(engine, first)
        mean["rouge_l_by_seed"] = [run["rouge_l"] for run in runs]  # type: ignore[assignment]
        return mean, texts[0][1]

    def _compare(self, engine: Engine, own: Rollouts) -> Figures:
        """KLs and agreement. All hidden states come from the decodes, but the model's own on the teacher's text."""
        taught = self.teacher_samples
        assert own.student_hidden is not None
        assert taught.student_hidden is not None
        written = own.student_hidden[own.response_mask]
        scored = written if own.teacher_hidden is None else own.teacher_hidden[own.response_mask]
        told = taught.student_hidden[taught.response_mask]
        read = told if engine is self.teacher else final_hidden(engine, taught, self.micro_batch, self.topology)
        figures = compare(engine, self.teacher, written, scored, ON_STUDENT_TEXT, self.topology)
        return figures | compare(engine, self.teacher, read, told, ON_TEACHER_TEXT, self.topology)

    def _sample(self, engine: Engine, scorer: Engine | None, name: str, seed: int) -> Rollouts:
        ends = EndIds(self.vocabulary.eos_ids, self.topology.device)
        worker = RolloutWorker(engine, scorer, self.settings, ends, seed, self.topology, keep_hidden=True)
        prompts = self.records.batch(self.share.indices)
        what = f"{name}, seed {seed + 1} of {self.seeds}"
        return respond(worker, prompts, self.share.indices, 0, what, self.topology.is_writer)


def evaluate(
    teacher: ModelSettings,
    models: dict[str, ModelSettings],
    data: Path,
    out: Path,
    settings: RolloutSettings,
    seeds: int,
    micro_batch: int,
) -> dict[str, Figures]:
    """Measure every model and write `out`: `figures` by model, and `samples` with all models side by side.

    Raises:
        BadInput: models or records that do not fit each other, before any model is loaded.
    """
    vocabulary = common_vocabulary([teacher, *models.values()])
    records = InstructionRecords(data, "--data")
    _check_records(data, vocabulary)
    topology = start()
    evaluation = Evaluation(teacher, vocabulary, records, settings, seeds, micro_batch, topology)
    report: dict[str, Figures] = {}
    texts: dict[str, dict[int, str]] = {}
    for name, model in models.items():
        report[name], mine = evaluation.measure(name, model)
        here = dict(zip(evaluation.share.indices, mine, strict=False))
        texts[name] = {i: text for part in topology.gather_objects(here) for i, text in part.items()}
    if topology.is_writer:
        indices = list(range(len(records)))
        samples = [
            {"prompt": prompt, "reference": references[0], **{name: texts[name][index] for name in models}}
            for index, prompt, references in zip(
                indices, records.prompts(indices), records.references(indices), strict=True
            )
        ]
        content = {"figures": report, "seeds": seeds, "settings": settings.model_dump(), "samples": samples}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    topology.barrier()
    return report


def _check_records(data: Path, vocabulary: Vocabulary) -> None:
    manifest = read_manifest(data, "--data")
    if manifest.tokenizer != fingerprint(vocabulary.tokenizer):
        wrong = "was tokenised by another tokenizer than the models'"
        raise BadInput(Problem("--data", str(data), wrong, "run `make preprocess` with TOKENIZER=<the teacher>"))
    if empty := manifest.counts.get("kept: without a response"):
        wrong = f"{empty} records have no reference response"
        raise BadInput(Problem("--data", str(data), wrong, "give records with an output"))
