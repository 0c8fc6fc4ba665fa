"""The settings of each objective: what `objective.name` chooses between. The formulas are in `distill/objectives/`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill.settings import Settings

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "akl", "tvd"]

_ON_POLICY = "Share of the optimizer steps that take fresh rollouts; the others take the recorded responses."
_TEMPERATURE = "Softens both models' distributions within the divergence, which is then multiplied by its square."
_ALPHA = "Skew: share of p in what skew KL compares p with, and of q in what skew reverse KL compares q with."


class ObjectiveBase(Settings):
    """What every objective says of the run it needs."""

    needs_teacher: ClassVar[bool] = True
    own_tokenizer: ClassVar[bool] = False
    """Whether the teacher may have a tokenizer of its own."""

    @property
    def samples(self) -> bool:
        """Whether rollouts take part."""
        return False

    @property
    def orders_vocabulary(self) -> bool:
        """Whether its loss sorts a distribution, which no rank can do of a part."""
        return False

    @property
    def reads_responses(self) -> bool:
        """Whether recorded responses take part."""
        return True


class Mixable(ObjectiveBase):
    """An objective for recorded responses, rollouts, or a mix of both."""

    on_policy: float = Field(0.0, ge=0, le=1, description=_ON_POLICY)

    @property
    def samples(self) -> bool:
        """In some steps at least."""
        return self.on_policy > 0

    @property
    def reads_responses(self) -> bool:
        """In some steps at least."""
        return self.on_policy < 1


class WithTruth(Mixable):
    """One that may take a share of cross-entropy too."""

    ce_weight: float = Field(
        0.0, ge=0, le=1, description="Share of cross-entropy on the recorded responses; rollouts have none."
    )

    @field_validator("ce_weight")
    @classmethod
    def _has_recorded_responses(cls, value: float, info: ValidationInfo) -> float:
        # The default stands in every resolved config.
        if value != cls.model_fields["ce_weight"].default and info.data.get("on_policy") == 1:
            raise ValueError("on_policy = 1 leaves no recorded responses for it; lower on_policy or remove ce_weight")
        return value


class Both(ObjectiveBase):
    """An objective that always takes recorded responses and rollouts."""

    @property
    def samples(self) -> bool:
        """Always."""
        return True


class Sampled(Both):
    """An objective for rollouts alone."""

    @property
    def reads_responses(self) -> bool:
        """Never."""
        return False


class SftSettings(ObjectiveBase):
    """Supervised fine-tuning: cross-entropy on the recorded responses."""

    needs_teacher: ClassVar[bool] = False

    name: Literal["sft"]


class SeqKdSettings(ObjectiveBase):
    """Sequence-level distillation: cross-entropy on responses that the teacher wrote (`data_prep.teacher_responses`);
    the ground truth is refused."""

    needs_teacher: ClassVar[bool] = False

    name: Literal["seqkd"]


# The knob that a divergence reads, with its default.
_KNOBS: dict[str, dict[str, float]] = {
    "jsd": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_rkl": {"alpha": 0.1},
    "akl": {"mu": 0.5},
}


class KdSettings(WithTruth):
    """Word-level distillation: a divergence between student and teacher at every response token."""

    name: Literal["kd"]
    divergence: Divergence = Field("forward_kl", description="Between student q and teacher p; see `divergences.py`.")
    beta: float | None = Field(
        None, ge=0, le=1, description="Teacher's share of `jsd`'s mixture: 0.5 there, no other reads it."
    )
    alpha: float | None = Field(
        None, ge=0, lt=1, description="Skew of `skew_kl` and `skew_rkl`: 0.1 there, no other reads it."
    )
    mu: float | None = Field(None, gt=0, lt=1, description="Probability of `akl`'s head: 0.5 there, no other reads it.")
    temperature: float = Field(1.0, gt=0, description=_TEMPERATURE)

    @model_validator(mode="before")
    @classmethod
    def _fill_knob(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        knobs = _KNOBS.get(str(given.get("divergence")), {})
        # A resolved config names every knob, as null where its divergence did not read it.
        return knobs | {name: value for name, value in given.items() if value is not None or name not in knobs}

    @property
    def orders_vocabulary(self) -> bool:
        """AKL: its head is made of the teacher's likeliest tokens."""
        return self.divergence == "akl"

    @field_validator("beta", "alpha", "mu")
    @classmethod
    def _is_read(cls, value: float | None, info: ValidationInfo) -> float | None:
        divergence = info.data.get("divergence")
        if value is not None and divergence is not None and info.field_name not in _KNOBS.get(divergence, {}):
            raise ValueError(f"divergence {divergence} does not read it; remove it")
        return value


class GkdSettings(Mixable):
    """GKD (arXiv 2306.13649): JSD(β) on a mix of sampled and recorded responses."""

    name: Literal["gkd"]
    beta: float = Field(0.5, ge=0, le=1, description="0: forward KL, 1: reverse KL, between them the JSD.")
    temperature: float = Field(1.0, gt=0, description=_TEMPERATURE)
    on_policy: float = Field(0.5, ge=0, le=1, description=_ON_POLICY)


class DistillmSettings(Both):
    """DistiLLM (arXiv 2402.03898): skew divergence on recorded responses and, with a probability that grows whenever
    validation loss rises, on the student's own from a replay buffer."""

    name: Literal["distillm"]
    divergence: Literal["skew_kl", "skew_rkl"] = Field("skew_rkl", description="Forward or reverse; `divergences.py`.")
    alpha: float = Field(0.1, gt=0, lt=1, description=_ALPHA)
    start: float = Field(0.0, ge=0, le=1, description="Probability of a replay step at the first step.")
    increase: float = Field(0.1, gt=0, le=1, description="Added to it when validation loss has risen.")
    tolerance: float = Field(0.1, ge=0, description="Rise of validation loss that counts, in nats a token.")
    adapt_every: int = Field(100, gt=0, description="Steps between looks at validation loss.")
    replay: int = Field(1024, gt=0, description="Newest rollouts kept for replay, over all ranks.")


class Distillm2Settings(Both):
    """DistiLLM-2 (arXiv 2503.07067): for each prompt the teacher's recorded response under (2 − β)·skew KL, and the
    student's own under β·skew reverse KL."""

    name: Literal["distillm2"]
    alpha: float = Field(0.1, gt=0, lt=1, description=_ALPHA)
    beta: float = Field(1.0, ge=0, le=2, description="Weight of the student's responses; 2 − β is the teacher's.")


class TaidSettings(Mixable):
    """TAID (arXiv 2501.16937): forward KL to a target that moves from the student's own logits to the teacher's."""

    name: Literal["taid"]
    start: float = Field(0.4, ge=0, le=1, description="Teacher's share t of the target's logits at the first step.")
    end: float = Field(1.0, ge=0, le=1, description="t at the last step, and its bound.")
    momentum: float = Field(0.99, ge=0, lt=1, description="Of the loss's relative fall, which drives t.")
    step_size: float = Field(
        5e-4, ge=0, description="α of t's own step, α·sigmoid(m)·(1 − t); it counts where it leads beyond the line."
    )

    @model_validator(mode="after")
    def _moves_forward(self) -> "TaidSettings":
        if self.end < self.start:
            raise ValueError(f"taid's end = {self.end} lies before its start = {self.start}")
        return self


class UldSettings(WithTruth):
    """Universal logit distillation (arXiv 2402.12030), for a teacher with another tokenizer: distance of the sorted
    probabilities, position by position."""

    own_tokenizer: ClassVar[bool] = True

    name: Literal["uld"]
    ce_weight: float = Field(
        0.4,
        ge=0,
        le=1,
        description="Share of cross-entropy on the recorded responses, rollouts have none; the paper's is 0.4.",
    )

    @property
    def orders_vocabulary(self) -> bool:
        """The probabilities of either model."""
        return True


class OpdSettings(Sampled):
    """On-policy distillation: policy gradient with the advantage log p − log q_old of the sampled token alone."""

    name: Literal["opd"]
    reward_clip: float | None = Field(None, gt=0, description="Advantages are clipped to ± this; none: no clip.")
    ratio_clip: float = Field(0.2, gt=0, description="ε of the clipped policy gradient.")


_MINILLM_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "first_reward": "next",
        "gamma": 1.0,
        "whitening": "none",
        "reward_scale": 1.0,
        "reward_clip": None,
        "weighted_single_step": True,
        "lm_soft_weight": 0.0,
    },
    "lmops": {
        "first_reward": "current",
        "gamma": 0.95,
        "whitening": "padded_micro_batch",
        "reward_scale": 0.5,
        "reward_clip": 100.0,
        "weighted_single_step": False,
        "lm_soft_weight": 0.5,
    },
}
_MINILLM_PRESETS["default"] = _MINILLM_PRESETS["lmops"] | {"whitening": "tokens"}


class MiniLLMSettings(Sampled):
    """MiniLLM (arXiv 2306.08543): reverse-KL policy gradient with a single-step term. The preset fills every
    knob that is not given."""

    name: Literal["minillm"]
    preset: Literal["default", "paper", "lmops"] = Field("default", description="Fills the knobs that are not given.")
    first_reward: Literal["current", "next"] = Field(
        description="Reward-to-go of step t starts at t (`current`) or t+1 (`next`).",
        json_schema_extra={"preset": True},
    )
    gamma: float = Field(ge=0, le=1, description="Discount of later rewards.", json_schema_extra={"preset": True})
    whitening: Literal["none", "tokens", "padded_micro_batch"] = Field(
        description="Normalise reward-to-go: not at all, over the real tokens of the optimizer step, or over each "
        "micro-batch's padded window.",
        json_schema_extra={"preset": True},
    )
    reward_scale: float = Field(gt=0, description="Rewards are divided by this.", json_schema_extra={"preset": True})
    reward_clip: float | None = Field(
        gt=0, description="Scaled rewards are clipped to ± this; none: no clip.", json_schema_extra={"preset": True}
    )
    weighted_single_step: bool = Field(
        description="Multiply the single-step term by the importance weight too.", json_schema_extra={"preset": True}
    )
    lm_soft_weight: float = Field(
        ge=0,
        le=1,
        description="Share of soft cross-entropy to the teacher in L_PT.",
        json_schema_extra={"preset": True},
    )
    length_normalised: bool = Field(True, description="Divide reward-to-go by its number of terms (Eq. 6).")
    single_step: bool = Field(True, description="Add the exact single-step term.")
    ratio_clip: float = Field(0.2, gt=0, description="ε of the clipped policy gradient.")
    lm_coef: float = Field(1.0, ge=0, description="Weight of L_PT.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = str(given.get("preset", "default"))
        # An unknown preset is left to the field's own check, which lists the right ones.
        return _MINILLM_PRESETS.get(preset, _MINILLM_PRESETS["default"]) | given


AnyObjective = (
    SftSettings
    | SeqKdSettings
    | KdSettings
    | GkdSettings
    | DistillmSettings
    | Distillm2Settings
    | TaidSettings
    | UldSettings
    | OpdSettings
    | MiniLLMSettings
)
ObjectiveSettings = Annotated[AnyObjective, Field(discriminator="name")]

OBJECTIVES: dict[str, type[ObjectiveBase]] = {
    "sft": SftSettings,
    "seqkd": SeqKdSettings,
    "kd": KdSettings,
    "gkd": GkdSettings,
    "distillm": DistillmSettings,
    "distillm2": Distillm2Settings,
    "taid": TaidSettings,
    "uld": UldSettings,
    "opd": OpdSettings,
    "minillm": MiniLLMSettings,
}
"""Settings by `objective.name`."""
