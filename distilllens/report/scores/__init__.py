"""Scores and answers that evaluations left, read."""
