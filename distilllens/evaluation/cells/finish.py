"""A cell whose answers are all there: scored, written, and its partial files removed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from distilllens.config import EvaluateConfig
from distilllens.errors import StorageError
from distilllens.evaluation.cells.partial import PartialAnswers, read_partial, remove_partial
from distilllens.evaluation.cells.plan import Cell
from distilllens.evaluation.cells.provenance import method_name
from distilllens.evaluation.cells.results import write_cell
from distilllens.evaluation.scoring.pool import Score, compute_metrics, score_answer, score_samples
from distilllens.runs import git_commit, versions


def finish_cell(
    config: EvaluateConfig, cell: Cell, known: Mapping[int, Score], console: Console
) -> None:
    """Scores what ``known`` does not hold, of earlier attempts, and writes the cell.

    Raises:
        StorageError: It cannot be written, or answers of other ranks are not there.
    """
    partial = read_partial(cell.folder, identity=cell.identity, seed=cell.seed)
    records = cell.data.records
    if lost := [row for row in range(len(records)) if row not in partial.answers]:
        raise StorageError(
            f"{cell.folder}: {len(lost)} answers are not there",
            why="files were removed, or the machines do not share this folder",
            fix="an --output_dir that all of them see; the same command answers what is missing",
        )
    answers = [partial.answers[row] for row in range(len(records))]
    scores = [
        known[row] if row in known else score_answer(answers[row].text, record.outputs)
        for row, record in enumerate(records)
    ]
    samples = [
        {**sample, "cut": sample["index"] in cell.data.cut}
        for sample in score_samples(answers, records, scores)
    ]
    result = _result(config, cell, partial, samples)
    write_cell(cell.folder, result, samples)
    remove_partial(cell.folder)
    metrics = result["metrics"]
    console.print(
        f"{cell.label}: Rouge-L {metrics['rougeL']:.2f}, exact match "
        f"{metrics['exact_match']:.2f}, {metrics['truncated']} of {metrics['num']} truncated",
        soft_wrap=True,
    )


def _result(
    config: EvaluateConfig,
    cell: Cell,
    partial: PartialAnswers,
    samples: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Returns the content of results.json; ``timing`` adds up the time of ranks and attempts."""
    metrics = compute_metrics(samples)
    dropped = cell.data.num_dropped
    return {
        "metrics": metrics,
        "set": cell.data.name,
        "seed": cell.seed,
        "name": method_name(config),
        "checkpoint": config.checkpoint,
        "identity": cell.identity,
        "counts": {
            "records": len(samples) + dropped,
            "scored": len(samples),
            "dropped_long_prompts": dropped,
            "cut_long_prompts": len(cell.data.cut),
            "truncated": metrics["truncated"],
        },
        "timing": {
            "seconds": round(partial.seconds, 3),
            "tokens_per_second": round(
                metrics["mean_tokens"] * len(samples) / max(partial.seconds, 1e-6), 1
            ),
        },
        "device": ", ".join(sorted({device for device, _ in partial.places})),
        "dtype": ", ".join(sorted({dtype for _, dtype in partial.places})),
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "git_commit": git_commit(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
