"""Evaluation: generation, scores, and the protocol of sets × seeds."""
