"""Checkpoints: saved beside the training, whole or not at all, checked before they are used, and for any layout."""
