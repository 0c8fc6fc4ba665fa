"""The settings of each objective: what `objective.name` chooses between. The formulas are in `distill/objectives/`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill.settings import Settings

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "akl", "tvd"]

_ON_POLICY = "Share of the optimizer steps that take fresh rollouts; the others take the recorded responses."
_TEMPERATURE = "Softens both models' distributions within the divergence, which is then multiplied by its square."


class SftSettings(Settings):
    """Supervised fine-tuning: cross-entropy on the recorded responses. With responses that the teacher wrote
    (`data_prep.teacher_responses`) this is sequence-level distillation, SeqKD."""

    needs_teacher: ClassVar[bool] = False
    on_policy: ClassVar[float] = 0.0

    name: Literal["sft"]


# The knob that a divergence reads, with its default.
_KNOBS: dict[str, dict[str, float]] = {
    "jsd": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_rkl": {"alpha": 0.1},
    "akl": {"mu": 0.5},
}


class KdSettings(Settings):
    """Word-level distillation: a divergence between student and teacher at every response token."""

    needs_teacher: ClassVar[bool] = True

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
    ce_weight: float = Field(
        0.0, ge=0, le=1, description="Share of cross-entropy on the recorded responses; rollouts have none."
    )
    on_policy: float = Field(0.0, ge=0, le=1, description=_ON_POLICY)

    @model_validator(mode="before")
    @classmethod
    def _fill_knob(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        knobs = _KNOBS.get(str(given.get("divergence")), {})
        # A resolved config names every knob, as null where its divergence did not read it.
        return knobs | {name: value for name, value in given.items() if value is not None or name not in knobs}

    @field_validator("beta", "alpha", "mu")
    @classmethod
    def _is_read(cls, value: float | None, info: ValidationInfo) -> float | None:
        divergence = info.data.get("divergence")
        if value is not None and divergence is not None and info.field_name not in _KNOBS.get(divergence, {}):
            raise ValueError(f"divergence {divergence} does not read it; remove it")
        return value

    @field_validator("on_policy")
    @classmethod
    def _leaves_recorded_responses(cls, value: float, info: ValidationInfo) -> float:
        if value == 1 and info.data.get("ce_weight"):
            raise ValueError("leaves no recorded responses for ce_weight; lower it or remove ce_weight")
        return value


class GkdSettings(Settings):
    """GKD (arXiv 2306.13649): JSD(β) on a mix of sampled and recorded responses."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["gkd"]
    beta: float = Field(0.5, ge=0, le=1, description="0: forward KL, 1: reverse KL, between them the JSD.")
    temperature: float = Field(1.0, gt=0, description=_TEMPERATURE)
    on_policy: float = Field(0.5, ge=0, le=1, description=_ON_POLICY)


class OpdSettings(Settings):
    """On-policy distillation: policy gradient with the advantage log p − log q_old of the sampled token alone."""

    needs_teacher: ClassVar[bool] = True
    on_policy: ClassVar[float] = 1.0

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


class MiniLLMSettings(Settings):
    """MiniLLM (arXiv 2306.08543): reverse-KL policy gradient with a single-step term. The preset fills every
    knob that is not given."""

    needs_teacher: ClassVar[bool] = True
    on_policy: ClassVar[float] = 1.0

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
        preset = given.get("preset", "default")
        # An unknown preset is left to the field's own check, which lists the right ones.
        return _MINILLM_PRESETS.get(preset, _MINILLM_PRESETS["default"]) | given


AnyObjective = SftSettings | KdSettings | GkdSettings | OpdSettings | MiniLLMSettings
ObjectiveSettings = Annotated[AnyObjective, Field(discriminator="name")]

OBJECTIVES: dict[str, type[Settings]] = {
    "sft": SftSettings,
    "kd": KdSettings,
    "gkd": GkdSettings,
    "opd": OpdSettings,
    "minillm": MiniLLMSettings,
}
"""Settings by `objective.name`."""
