"""Objective name → objective. Each is a pure function of tensors: sums over tokens, no collectives, no DeepSpeed."""

from distill.objective_settings import (
    AnyObjective,
    Distillm2Settings,
    DistillmSettings,
    GkdSettings,
    KdSettings,
    MiniLLMSettings,
    OpdSettings,
    SeqKdSettings,
    SftSettings,
    TaidSettings,
    UldSettings,
)
from distill.objectives.minillm import MiniLLM
from distill.objectives.supervised import Sft
from distill.objectives.taid import Taid
from distill.objectives.terms import LossTerms, Objective
from distill.objectives.uld import Uld
from distill.objectives.word_level import Distillm2, Kd

__all__ = ["LossTerms", "Objective", "build"]


def build(settings: AnyObjective) -> Objective:
    """The objective that `objective.name` asks for."""
    match settings:
        case SftSettings() | SeqKdSettings():
            return Sft()
        case KdSettings():
            return Kd.of(settings)
        case GkdSettings():
            return Kd("jsd", settings.temperature, beta=settings.beta)
        case DistillmSettings():
            return Kd(settings.divergence, alpha=settings.alpha)
        case Distillm2Settings():
            return Distillm2(settings)
        case TaidSettings():
            return Taid(settings)
        case UldSettings():
            return Uld(settings)
        case OpdSettings():
            return MiniLLM(_sampled_token_only(settings))
        case MiniLLMSettings():
            return MiniLLM(settings)


def _sampled_token_only(settings: OpdSettings) -> MiniLLMSettings:
    """MiniLLM's policy gradient with a horizon of one token and nothing else."""
    knobs = {"first_reward": "current", "gamma": 0.0, "length_normalised": False, "single_step": False}
    clips = {"reward_clip": settings.reward_clip, "ratio_clip": settings.ratio_clip}
    return MiniLLMSettings.model_validate({"name": "minillm", "preset": "paper"} | knobs | clips)
