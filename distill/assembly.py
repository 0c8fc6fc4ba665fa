"""What a run is made of: its models, and where its micro-batches come from."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from distill.config import Config, ModelSettings
from distill.data.loading import InstructionRecords
from distill.data.records import read_manifest
from distill.data.translation import Translator
from distill.deepspeed_settings import read_deepspeed_json, resolve_dtype
from distill.engine import Engine
from distill.evaluation.validation import Validation
from distill.models.loading import load_config, load_generation_config, load_tokenizer
from distill.models.vocabulary import eos_ids, shared_vocabulary
from distill.objective_settings import Distillm2Settings, DistillmSettings, Mixable
from distill.replay import ReplaySource
from distill.rollout.ends import Ends, response_ends
from distill.rollout.external import ExternalWorker
from distill.rollout.vllm_engine import VllmEngine
from distill.rollout.worker import RolloutWorker
from distill.sources import (
    RECORDED_IN_MIX,
    MixedSource,
    PairedSource,
    RecordedSource,
    RolloutSource,
    Sampler,
    Source,
)
from distill.teacher import Teacher
from distill.topology import Topology
from distill.whereabouts import here


@dataclass(frozen=True)
class Models:
    """Student and teacher on their ranks: the student's `topology`, and the teacher's `grid`."""

    topology: Topology
    grid: Topology
    tokenizer: PreTrainedTokenizerBase
    eos_ids: list[int]
    ends: Ends
    student: Engine
    teacher: Teacher | None
    alike: Engine | None
    """The teacher, unless it has another tokenizer: then it can neither mix into a rollout nor score its tokens."""


def load_models(config: Config, topology: Topology, grid: Topology) -> Models:
    """Load what the objective needs. Collective."""
    given = config.teacher if config.objective.needs_teacher else None
    apart, tp = config.objective.own_tokenizer, config.parallel
    settings = [config.student] if given is None or apart else [config.student, given]
    model_configs = [load_config(model, "student.path or teacher.path") for model in settings]
    tokenizer = load_tokenizer(config.student.path, "student.path", config.student.trust_remote_code)
    eos = eos_ids(tokenizer, [*model_configs, *map(load_generation_config, settings)])
    ends = response_ends(config.rollout, eos, tokenizer, topology.device)
    vocab = shared_vocabulary(tokenizer, *model_configs)
    deepspeed_json, dtype = read_deepspeed_json(tp.deepspeed), resolve_dtype(config.precision)
    with here.within("load student"):
        student = Engine(config.student, deepspeed_json, dtype, topology, vocab, tp.student_tp, config.optim)
    if given is None:
        return Models(topology, grid, tokenizer, eos, ends, student, None, None)
    translate, theirs = _translator(given, tokenizer, eos) if apart else (None, vocab)
    # Both models' logits of an id must lie on one rank; their heads may be padded differently.
    rows = model_configs[0].get_text_config().vocab_size if tp.student_tp > 1 and not apart else None
    with here.within("load teacher"):
        engine = Engine(given, deepspeed_json, dtype, grid, theirs, tp.teacher_tp, head_rows=rows)
    teacher = Teacher(engine, topology, grid, translate, student.shard)
    return Models(topology, grid, tokenizer, eos, ends, student, teacher, None if apart else engine)


def _translator(teacher: ModelSettings, ours: PreTrainedTokenizerBase, eos: list[int]) -> tuple[Translator, int]:
    """From the student's tokens to those of a teacher with another tokenizer, and how many it has."""
    tokenizer = load_tokenizer(teacher.path, "teacher.path", teacher.trust_remote_code)
    model_config = load_config(teacher, "teacher.path")
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return Translator(ours, tokenizer, eos, longest), shared_vocabulary(tokenizer, model_config)


def open_source(config: Config, models: Models, validation: Validation | None, progress: Callable[[], float]) -> Source:
    """Where the objective's micro-batches come from; `progress` is the share of the run that is done."""
    records, objective = InstructionRecords(config.data.train, "data.train"), config.objective
    if not objective.samples:
        return RecordedSource(records, config, models.topology)
    assert models.teacher is not None
    sampler = Sampler(records, _worker(config, models), models.teacher, config, models.topology)
    recorded = RecordedSource(records, config, models.topology, RECORDED_IN_MIX)
    if isinstance(objective, DistillmSettings):
        assert validation is not None
        return ReplaySource(recorded, sampler, validation.loss, progress, objective, config)
    if isinstance(objective, Distillm2Settings):
        return PairedSource(sampler, config)
    rollouts = RolloutSource(sampler, config, config.optim.batch_size)
    if isinstance(objective, Mixable) and objective.reads_responses:
        return MixedSource(recorded, rollouts, objective.on_policy, config.run.seed)
    return rollouts


def _worker(config: Config, models: Models) -> RolloutWorker:
    settings = config.rollout
    # Ranks that share a teacher decode together if it takes part.
    topology = models.grid if models.alike else models.topology
    given = (models.student, models.alike, settings, models.ends, config.run.seed, topology)
    if settings.engine == "builtin":
        return RolloutWorker(*given)
    dtype, ends = resolve_dtype(config.precision), [*models.eos_ids, *settings.stop_ids]
    longest = read_manifest(config.data.train, "data.train").settings.max_prompt
    vocab, device = models.student.vocab, topology.device
    return ExternalWorker(*given, VllmEngine(config.student, dtype, vocab, settings, ends, longest, device))
