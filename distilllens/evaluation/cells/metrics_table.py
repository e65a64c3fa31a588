"""The table of all metrics beside Rouge-L, as `evaluate.py` shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from distilllens.evaluation.cells.results import mean_and_sd

LABELS = {
    "num": "answers a seed (n)",
    "exact_match": "exact match, %",
    "similarity": "similarity × 100",
    "distinct_1": "distinct-1, %",
    "distinct_2": "distinct-2, %",
    "distinct_3": "distinct-3, %",
    "distinct_4": "distinct-4, %",
    "rep_4": "rep-4, %",
    "mean_tokens": "tokens an answer",
    "mean_words": "words an answer",
    "truncated_percent": "truncated, %",
    "empty_percent": "empty, %",
    "nll": "loss, nats a token",
    "perplexity": "perplexity",
    "top1": "top-1 accuracy, %",
    "ece": "calibration error, %",
    "entropy": "entropy, nats",
    "teacher_entropy": "teacher's entropy, nats",
    "entropy_gap": "entropy gap, nats",
    "kl_teacher_student": "KL(teacher‖student), nats",
    "kl_student_teacher": "KL(student‖teacher), nats",
    "agreement": "top-1 agreement, %",
    "ex_acc_err": "excess accumulated error, %",
    "ex_acc_err_se": "its standard error, %",
    "ex_acc_err_per_token": "the same per token, %",
}
"""Metrics in the table's order; one that a results.json lacks was not measured."""


def build_metrics_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Returns all metrics but Rouge-L by set: mean ± standard deviation over the seeds.

    A number that does not depend on the seed, as the token metrics, stands alone.

    Args:
        results: The results.json of all cells.
    """
    sets = list(dict.fromkeys(result["set"] for result in results))
    seeds = len({result["seed"] for result in results})
    table = Table(title=f"Other metrics: mean ± sd, n = {seeds} seeds")
    table.add_column("metric", no_wrap=True)
    for name in sets:
        table.add_column(name, justify="right", no_wrap=True)
    for metric, label in LABELS.items():
        cells = [
            _cell([r["metrics"] for r in results if r["set"] == name], metric) for name in sets
        ]
        if any(cells):
            table.add_row(label, *cells)
    return table


def _cell(metrics: Sequence[Mapping[str, float]], name: str) -> str:
    values = [float(of_seed[name]) for of_seed in metrics if name in of_seed]
    if not values:
        return ""
    mean, sd = mean_and_sd(values)
    digits = 0 if name == "num" else 2 if abs(mean) >= 10 else 4 if abs(mean) < 1 else 3
    spread = "" if sd is None or len(set(values)) == 1 else f" ± {sd:.{digits}f}"
    seeds = "" if len(values) == len(metrics) else f" (n = {len(values)})"
    return f"{mean:.{digits}f}{spread}{seeds}"
