"""Objective name → objective. Each is a pure function of tensors: sums over tokens, no collectives, no DeepSpeed."""

from distill.config import MiniLLMSettings, SftSettings
from distill.objectives.minillm import MiniLLM
from distill.objectives.supervised import Sft
from distill.objectives.terms import LossTerms, Objective

__all__ = ["LossTerms", "Objective", "build"]


def build(settings: SftSettings | MiniLLMSettings) -> Objective:
    """The objective that `objective.name` asks for."""
    return MiniLLM(settings) if isinstance(settings, MiniLLMSettings) else Sft()
