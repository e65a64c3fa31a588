"""What a model card tells of evaluations: only those of the very weights that the card is of."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilllens.evaluation.cells.provenance import checkpoint_fingerprint
from distilllens.evaluation.cells.results import mean_and_sd, read_result
from distilllens.report.scores.load import Score, collect_scores, evaluation_folder

Settings = tuple[tuple[str, str], ...]
"""How answers were generated: names, and values as JSON."""
FROM_IDENTITY = ("attention", "backend", "dtype", "sampler")
"""Entries of a result's identity that decide answers too, beside weights and records."""


@dataclass(frozen=True, kw_only=True)
class CardScore:
    """One metric on one set, under one way of answering."""

    test_set: str
    metric: str
    """Key of results.json."""
    settings: Settings
    mean: float
    sd: float | None
    """Sample standard deviation over the seeds; None for a single one."""
    n: int
    """Number of sampling seeds."""
    num_prompts: int


def scores_of_model(folder: Path, evaluations: Sequence[Path]) -> list[CardScore]:
    """Reads the evaluations of a model.

    Args:
        folder: Of the model.
        evaluations: Folders that `evaluate.py` wrote. Results of other weights below them are left
            out: they are told apart by `checkpoint_fingerprint`.

    Returns:
        Sorted; of a set that was scored whole and in part (``--limit``), only the largest part.

    Raises:
        ConfigError: A folder does not exist.
        DataError: A results.json is not what evaluate.py writes.
    """
    fingerprint = checkpoint_fingerprint(str(folder))
    grouped: dict[tuple[Settings, str, str], list[Score]] = defaultdict(list)
    for score in collect_scores(evaluations):
        identity = read_result(score.file).get("identity", {})
        if identity.get("weights and tokenizer") == fingerprint:
            for metric in score.metrics:
                grouped[_settings(score, identity), score.test_set, metric].append(score)
    summaries = []
    for (settings, test_set, metric), scores in sorted(grouped.items()):
        largest = max(scores, key=lambda score: (score.num_prompts, score.records or "")).records
        # A copied result counts once.
        by_seed = {score.sampling_seed: score for score in scores if score.records == largest}
        mean, sd = mean_and_sd([score.metrics[metric] for score in by_seed.values()])
        summaries.append(
            CardScore(
                test_set=test_set,
                metric=metric,
                settings=settings,
                mean=mean,
                sd=sd,
                n=len(by_seed),
                num_prompts=min(score.num_prompts for score in by_seed.values()),
            )
        )
    return summaries


def mirrored_evaluations(run: Path) -> list[Path]:
    """Returns where evaluate.py puts the results of a run, if anything is there."""
    mirrored = evaluation_folder(run)
    return [mirrored] if mirrored is not None and mirrored.is_dir() else []


def _settings(score: Score, identity: Mapping[str, Any]) -> Settings:
    own = {name: identity[name] for name in FROM_IDENTITY if name in identity}
    settings = {**score.settings, **own}
    return tuple((name, json.dumps(value)) for name, value in sorted(settings.items()))
