"""DistillLens: distillation of language models through the logit lens."""

__version__ = "0.1.0"
