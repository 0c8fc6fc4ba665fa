"""The whole run as frozen, typed settings: one YAML file plus `section.key=value` overrides.

Every field carries the text that the README's reference shows. A key that no model knows is an error that names
the nearest right spelling; nothing is ever silently ignored.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from distill.errors import BadInput, Problem
from distill.objective_settings import OBJECTIVES, ObjectiveSettings
from distill.settings import FilePath, ModelPath, Settings
from distill.settings_file import Kind, describe, read_settings

RESOLVED = "config.yaml"
"""The run folder's copy of its settings, every default and preset written out."""


class RunSettings(Settings):
    """Where the run lives and what makes it repeatable."""

    folder: FilePath = Field(description="Run folder: resolved config, metrics, checkpoints, samples and the student.")
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seeds data order, coins and every sampled token, each on its own axis."
    )


class ModelSettings(Settings):
    """A causal language model and how to open it."""

    path: ModelPath = Field(description="Hugging Face folder or hub id.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the weights.")
    allow_pickle: bool = Field(False, description="Read weights from pickle files where there are no safetensors.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward (training only).")


class DataSettings(Settings):
    """Folders written by `make preprocess`."""

    train: FilePath = Field(description="Training records (prompts and responses).")
    valid: FilePath | None = Field(None, description="Validation records; without them the last student is kept.")
    plain_text: FilePath | None = Field(
        None, description="Records for L_PT: packed plain text, or instructions with responses; none switches L_PT off."
    )


class RolloutSettings(Settings):
    """How responses are sampled. Batch sizes are global: they do not change with the number of ranks."""

    engine: Literal["builtin", "vllm"] = Field(
        "builtin", description="What samples; vllm: for the student alone (alpha 0) on CUDA devices, installed apart."
    )
    vllm_memory: float = Field(
        0.3, gt=0, lt=1, description="Share of each device's memory that vllm takes while it samples, weights included."
    )
    alpha: float = Field(
        0.2, ge=0, lt=1, description="Teacher's share of the sampling mixture (Eq. 4); 0: student only."
    )
    coins: Literal["shared", "per_row"] = Field(
        "shared", description="One coin sequence for all rows of a round (α·T teacher calls), or one a row."
    )
    temperature: float = Field(1.0, gt=0, description="Applies to both models' proposals.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens of each model; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep each model's smallest set of this probability; 1: all.")
    max_new_tokens: int = Field(256, gt=0, description="Longest response, EOS included.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Texts that end a response, and belong to it, besides EOS."
    )
    stop_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="Token ids that end one, besides EOS.")
    gather: Literal["auto", "once", "layer"] = Field(
        "auto", description="ZeRO-3: whole weights for a round, or each layer at each token; auto: once if it fits."
    )
    batch: int = Field(32, gt=0, description="Rows decoded together on one rank.")
    per_round: int = Field(256, gt=0, description="Rollouts sampled before each set of inner epochs.")
    samples_per_prompt: int = Field(1, gt=0, description="Responses to each prompt of a round; divides per_round.")
    inner_epochs: int = Field(4, gt=0, description="Passes over each round's rollouts.")
    teacher_cache: Literal["device", "host"] = Field(
        "device", description="Where the teacher's final hidden states wait for the loss; `host`: pinned memory."
    )


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(Settings):
    """AdamW and its schedule. `batch_size` is global; `micro_batch` is what one rank takes at once."""

    lr: float = Field(5e-6, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up from 0.")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.95), description="AdamW's moment decay rates.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay of matrices; vectors are exempt.")
    clip_norm: float = Field(1.0, gt=0, description="Global gradient-norm clip.")
    dropout: bool = Field(
        True,
        description="Keep the student's own dropout in steps on recorded responses; steps with rollouts never have it.",
    )
    batch_size: int = Field(64, gt=0, description="Sequences in one optimizer step, over all ranks.")
    micro_batch: int = Field(8, gt=0, description="Sequences in one forward and backward on one rank.")
    steps: int = Field(gt=0, description="Optimizer steps.")
    max_minutes: float | None = Field(
        None, gt=0, description="Stop after this training time, evaluation and saving excluded, even if steps remain."
    )


class ParallelSettings(Settings):
    """How both models are laid out over the ranks."""

    deepspeed: FilePath = Field(
        Path("ds_configs/zero3.json"), description="DeepSpeed JSON; its `auto` values are filled here."
    )
    student_tp: int = Field(1, gt=0, description="Tensor-parallel degree of the student.")
    teacher_tp: int = Field(
        1, gt=0, description="Tensor-parallel degree of the teacher: the student's, or any beside a student of 1."
    )
    timeout_minutes: float = Field(
        120,
        gt=0,
        le=525_600,
        description="Longest wait of a rank for the others before the run ends: one of them is gone.",
    )


Metric = Literal["loss", "rouge_l", "reverse_kl"]
"""What a validation can be judged by: −log q of the recorded responses, Rouge-L or KL(q‖p) of the student's samples."""


class EvaluationSettings(Settings):
    """Validation during training. The student that is best by `metric` is kept."""

    every: int = Field(0, ge=0, description="Steps between validations; 0: only at the end.")
    prompts: int = Field(64, gt=0, description="Validation records used, at most.")
    seeds: int = Field(1, gt=0, description="Sampled responses to each of them; figures are means over these rounds.")
    metric: Literal["auto", Metric] = Field(
        "auto", description="What the best student is chosen by; `auto`: rouge_l, for sft, seqkd and uld loss."
    )
    patience: int = Field(
        0, ge=0, description="Validations in a row without improvement after which the run is finished; 0: never."
    )
    min_improvement: float = Field(
        0.0, ge=0, description="Change of the metric for the better that `patience` counts as one, in its own unit."
    )


class CheckpointSettings(Settings):
    """Saving for resume."""

    every: int = Field(100, gt=0, description="Steps between checkpoints; the last step always saves.")
    keep: int = Field(2, gt=0, description="Newest checkpoints kept, besides that of the best student.")


class FaultSettings(Settings):
    """What a run does when something goes wrong."""

    stall_timeout: float = Field(
        1800, gt=0, description="Seconds without progress on any rank after which all dump their stacks and end."
    )
    max_bad_steps: int = Field(
        10, ge=0, description="Steps in a row that may be skipped because a number in them is not finite."
    )
    loss_spike: float = Field(
        6.0, ge=0, description="Warn of a loss so many standard deviations above its running mean; 0: never."
    )
    min_length: float = Field(
        0.25, ge=0, lt=1, description="Warn where responses are under this share of the first rounds' length; 0: never."
    )
    min_distinct: float = Field(
        0.5, ge=0, le=1, description="Warn where fewer of a response's 4-grams are distinct, as a share; 0: never."
    )


class LogSettings(Settings):
    """metrics.jsonl, wandb and TensorBoard get the same records; the console shows a few of the figures."""

    every: int = Field(1, gt=0, description="Steps between records.")
    samples: int = Field(4, ge=0, description="Rollouts written to samples.jsonl each round.")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="`auto`: online when a key is at hand, offline otherwise."
    )
    project: str = Field("distill", description="wandb project.")
    tensorboard: bool = Field(False, description="Write TensorBoard's event files into RUN/tensorboard.")


class Config(Settings):
    """One run."""

    run: RunSettings
    student: ModelSettings
    teacher: ModelSettings | None = None
    data: DataSettings
    objective: ObjectiveSettings
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="`auto`: bf16 where the hardware has it, else fp16 on accelerators and fp32 on processors.",
    )
    optim: OptimSettings
    rollout: RolloutSettings = RolloutSettings()
    parallel: ParallelSettings = ParallelSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    fault: FaultSettings = FaultSettings()
    log: LogSettings = LogSettings()

    @property
    def tensor_parallel(self) -> int:
        """Ranks among which a model is split: the teacher's degree, or the student's where there is no teacher."""
        return self.parallel.teacher_tp if self.objective.needs_teacher else self.parallel.student_tp

    @property
    def teacher_scores(self) -> bool:
        """Whether a teacher can say what it thinks of the student's tokens."""
        return self.objective.needs_teacher and not self.objective.own_tokenizer

    @property
    def validation_metric(self) -> Metric:
        """What `evaluation.metric` comes to."""
        if self.evaluation.metric != "auto":
            return self.evaluation.metric
        return "rouge_l" if self.teacher_scores else "loss"

    @property
    def validation_samples(self) -> bool:
        """Whether the student writes responses to be judged by."""
        return self.teacher_scores or self.validation_metric == "rouge_l"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's YAML, apply `section.key=value` overrides, check everything.

    Raises:
        BadInput: an unreadable file, an override that is not `key=value`, or settings that do not fit; all at once.
    """
    return read_settings(_RECIPE, Path(path), overrides)


def model_at(path: str, field: str, allow_pickle: bool = False) -> ModelSettings:
    """The settings of a model that a command's own argument names.

    Raises:
        BadInput: what cannot be a path or a hub id; names the argument `field`.
    """
    try:
        return ModelSettings(path=path, allow_pickle=allow_pickle)
    except ValidationError as error:
        problem = describe(error.errors()[0], _RECIPE)
        raise BadInput(Problem(field, path, problem.wrong, "give a Hugging Face folder or hub id")) from None


def dump(config: Config) -> str:
    """The resolved settings as YAML that `load` reads back to an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def section_models() -> dict[str, type[Settings]]:
    """Section name → settings model, in the order of the YAML, but for `objective`, which has several."""
    return {
        "run": RunSettings,
        "student": ModelSettings,
        "teacher": ModelSettings,
        "data": DataSettings,
        "optim": OptimSettings,
        "rollout": RolloutSettings,
        "parallel": ParallelSettings,
        "evaluation": EvaluationSettings,
        "checkpoint": CheckpointSettings,
        "fault": FaultSettings,
        "log": LogSettings,
    }


_RECIPE = Kind(
    model=Config,
    sections=section_models() | OBJECTIVES,
    field="--config",
    what="a recipe, as in launch/recipes/",
    holds="sections such as `student:`",
    reference="the config reference",
)
