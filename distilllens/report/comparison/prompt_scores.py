"""One value per prompt out of the samples.jsonl files of a method: its mean over the seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distilllens.errors import DataError
from distilllens.report.scores.load import Method, Score
from distilllens.report.scores.metrics import metric_of
from distilllens.statistics import FloatArray


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """A method on one set. Letter in names: `N` prompts."""

    prompts_N: NDArray[np.int64]
    """A number for each prompt with its index: equal where both are (within this process)."""
    values: Mapping[str, FloatArray]
    """By metric, [N]: the mean over the seeds, in the unit of results.json."""
    num_seeds: int
    """Number of files that the means are over."""


def read_prompt_scores(
    method: Method, test_set: str, metrics: Sequence[str]
) -> tuple[PromptScores | None, list[str]]:
    """Reads a method's samples of one set, a line at a time.

    Args:
        method: The method; scored on the set at least once.
        test_set: The set.
        metrics: Names of results.json; those that are no mean over prompts are left out and told.

    Returns:
        The values, None where a seed's samples are missing or its prompts are others (a mean over
        fewer seeds would pass for the same); and what was left out, one sentence each.

    Raises:
        DataError: A broken line of a samples.jsonl, by file and number.
    """
    scores = [score for score in method.scores if score.test_set == test_set]
    where = f"{method.label} on {test_set}"
    prompts_N: NDArray[np.int64] | None = None
    sums: dict[str, FloatArray] = {}
    notes: list[str] = []
    wanted = list(metrics)
    for score in scores:
        file = score.file.with_name("samples.jsonl")
        if not file.is_file():
            return None, [f"{where}: no {file}, so no statistics over prompts"]
        seed_prompts_N, columns = _read_columns(file, wanted)
        if prompts_N is None:
            prompts_N = seed_prompts_N
        elif not np.array_equal(prompts_N, seed_prompts_N):
            return None, [f"{where}: other prompts in {file} than with the first seed"]
        for metric in wanted.copy():
            values, problem = _scaled(metric, columns[metric], score)
            if values is None:
                notes.append(f"{where}: no statistics over prompts of {metric}: {problem}")
                wanted.remove(metric)
                sums.pop(metric, None)
            else:
                sums[metric] = sums.get(metric, 0.0) + values
    if prompts_N is None:
        return None, []
    values_of = {metric: total / len(scores) for metric, total in sums.items()}
    return PromptScores(prompts_N=prompts_N, values=values_of, num_seeds=len(scores)), notes


def _read_columns(
    file: Path, metrics: Sequence[str]
) -> tuple[NDArray[np.int64], dict[str, FloatArray]]:
    """Returns the prompts and a column per metric, NaN where a line has no such number."""
    keys = {metric: metric_of(metric).per_prompt for metric in metrics}
    prompts: list[int] = []
    columns: dict[str, list[float]] = {metric: [] for metric in metrics}
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if raw.isspace():
                continue
            try:
                line = json.loads(raw)
                prompts.append(hash((line["index"], line["prompt"])))
                for metric, key in keys.items():
                    value = line.get(key)
                    columns[metric].append(math.nan if value is None else float(value))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{file}:{number}: not a sample of evaluate.py: {type(error).__name__} {error}",
                    fix="evaluate again with --overwrite",
                ) from None
    arrays = {metric: np.array(column, dtype=np.float64) for metric, column in columns.items()}
    return np.array(prompts, dtype=np.int64), arrays


def _scaled(metric: str, column_N: FloatArray, score: Score) -> tuple[FloatArray | None, str]:
    """Returns a column in the unit of results.json, or why it is not what that is the mean of."""
    stored = score.metrics.get(metric, math.nan)
    if math.isnan(stored):
        return None, f"{score.file} has none"
    if not np.isfinite(column_N).all() or not len(column_N):
        return None, f"not every line of {score.file.with_name('samples.jsonl')} has a number"
    mean = float(column_N.mean())
    # results.json gives percent of samples.jsonl's [0, 1], or the same, or a number of prompts.
    for scale in (100.0, 1.0, float(len(column_N))):
        if math.isclose(scale * mean, stored, rel_tol=1e-6, abs_tol=1e-9):
            return scale * column_N, ""
    return None, f"{score.file} says {stored:g}, the mean over its samples.jsonl is {mean:g}"
