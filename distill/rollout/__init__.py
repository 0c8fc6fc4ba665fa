"""Sampling responses from the teacher–student mixture, scored by both models in the same pass."""
