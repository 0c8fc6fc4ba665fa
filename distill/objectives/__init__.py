"""Objective name → objective. Each is a pure function of tensors: sums over tokens, no collectives, no DeepSpeed."""

from distill.objective_settings import AnyObjective, GkdSettings, KdSettings, MiniLLMSettings, OpdSettings
from distill.objectives.kd import Kd
from distill.objectives.minillm import MiniLLM
from distill.objectives.supervised import Sft
from distill.objectives.terms import LossTerms, Objective

__all__ = ["LossTerms", "Objective", "build"]


def build(settings: AnyObjective) -> Objective:
    """The objective that `objective.name` asks for."""
    match settings:
        case MiniLLMSettings():
            return MiniLLM(settings)
        case KdSettings():
            return Kd(settings)
        case GkdSettings():
            common = {"temperature": settings.temperature, "on_policy": settings.on_policy}
            return Kd(KdSettings(name="kd", divergence="jsd", beta=settings.beta, **common))
        case OpdSettings():
            return MiniLLM(_sampled_token_only(settings))
        case _:
            return Sft()


def _sampled_token_only(settings: OpdSettings) -> MiniLLMSettings:
    """MiniLLM's policy gradient with a horizon of one token and nothing else."""
    knobs = {"first_reward": "current", "gamma": 0.0, "length_normalised": False, "single_step": False}
    clips = {"reward_clip": settings.reward_clip, "ratio_clip": settings.ratio_clip}
    return MiniLLMSettings.model_validate({"name": "minillm", "preset": "paper"} | knobs | clips)
