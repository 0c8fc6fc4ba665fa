"""MiniLLM distillation of large language models under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
