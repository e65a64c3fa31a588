"""What a model card tells of evaluations: only those of the very weights that the card is of."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilllens.config import EvaluateConfig
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint
from distilllens.evaluation.cells.results import mean_and_sd, read_result
from distilllens.evaluation.measures.run import EXPOSURE_FILE, TOKEN_FOLDER
from distilllens.public import public_path
from distilllens.report.scores.load import Score, collect_scores, evaluation_folder
from distilllens.report.scores.metrics import METRICS, metric_of

Settings = tuple[tuple[str, str], ...]
"""Names, and values as JSON."""
FROM_IDENTITY = ("attention", "backend", "dtype", "sampler")
"""Entries of a result's identity that decide answers too, beside weights and records."""
OF_RECORDS = ("data_dir", "limit", "bad_lines")
"""Options that decide which records are scored, beside eval.long_prompts."""
OF_TEACHER = ("teacher", "teacher_lora", "teacher_revision")
DEFAULTS = dataclasses.asdict(EvaluateConfig())


@dataclass(frozen=True, kw_only=True)
class CardScore:
    """One metric on one set, under one way of answering."""

    test_set: str
    metric: str
    """Key of results.json."""
    settings: Settings
    """How answers were generated."""
    options: Settings
    """What else evaluate.py was asked for: its options by their full names."""
    mean: float
    sd: float | None
    """Sample standard deviation over the seeds; None for a single value."""
    n: int
    """Number of sampling seeds; 1 of what is measured once per set."""
    num_prompts: int


@dataclass(frozen=True)
class _Scored:
    """A results.json, as reports read it and as it stands there."""

    score: Score
    content: Mapping[str, Any]


def scores_of_model(folder: Path, evaluations: Sequence[Path]) -> list[CardScore]:
    """Reads the evaluations of a model.

    Args:
        folder: Of the model.
        evaluations: Folders that `evaluate.py` wrote. Results of other weights below them are left
            out: they are told apart by `checkpoint_fingerprint`.

    Returns:
        By settings and set; of a set that was scored whole and in part (``--limit``), only the
        largest part.

    Raises:
        ConfigError: A folder does not exist.
        DataError: A results.json is not what evaluate.py writes.
    """
    fingerprint = checkpoint_fingerprint(str(folder))
    grouped: dict[tuple[Settings, str], list[_Scored]] = defaultdict(list)
    for score in collect_scores(evaluations):
        scored = _Scored(score, read_result(score.file))
        if scored.content.get("identity", {}).get("weights and tokenizer") == fingerprint:
            grouped[_settings(scored), score.test_set].append(scored)
    summaries: list[CardScore] = []
    for (settings, test_set), members in sorted(grouped.items()):
        largest = max(
            (one.score for one in members), key=lambda s: (s.num_prompts, s.records or "")
        )
        kept = [one for one in members if one.score.records == largest.records]
        options = _options(kept)
        summaries += [
            CardScore(
                test_set=test_set,
                metric=metric,
                settings=settings,
                options=options,
                mean=mean,
                sd=sd,
                n=n,
                num_prompts=min(one.score.num_prompts for one in kept),
            )
            for metric, mean, sd, n in _figures([one.score for one in kept])
        ]
    return summaries


def mirrored_evaluations(run: Path) -> list[Path]:
    """Returns where evaluate.py puts the results of a run, if anything is there."""
    mirrored = evaluation_folder(run)
    return [mirrored] if mirrored is not None and mirrored.is_dir() else []


def _figures(scores: Sequence[Score]) -> Iterator[tuple[str, float, float | None, int]]:
    """Yields each metric in the order of reports, with mean, spread and n; no counts."""
    names = {name for score in scores for name in score.metrics}
    counts = {"num"} | {name for name in names if f"{name}_percent" in names}
    known = [name for name in METRICS if name in names - counts]
    for metric in [*known, *sorted(names - counts - set(known))]:
        # A copied result counts once.
        by_seed = {s.sampling_seed: s.metrics[metric] for s in scores if metric in s.metrics}
        if metric_of(metric).once_per_set:
            for value in dict.fromkeys(by_seed.values()):  # several only of several teachers
                yield metric, value, None, 1
        else:
            yield metric, *mean_and_sd(list(by_seed.values())), len(by_seed)


def _settings(scored: _Scored) -> Settings:
    content = scored.content
    identity, of_eval = content.get("identity", {}), content["config"]["eval"]
    own = {name: identity[name] for name in FROM_IDENTITY if name in identity}
    if "long_prompts" in of_eval:
        own["long_prompts"] = of_eval["long_prompts"]
    return _as_json({**scored.score.settings, **own})


def _options(kept: Sequence[_Scored]) -> Settings:
    """Returns what makes evaluate.py score these seeds of these records, and measure as much."""
    options: dict[str, Any] = {"eval.seeds": sorted({one.score.sampling_seed for one in kept})}
    for one in kept:
        config = one.content["config"]
        asked = {name: config.get(name, DEFAULTS[name]) for name in OF_RECORDS}
        asked |= _measures(one.score.file, one.content)
        options |= {name: value for name, value in asked.items() if value != DEFAULTS[name]}
    for name, value in options.items():
        options[name] = public_path(value) if isinstance(value, str) else value
    return _as_json(options)


def _measures(file: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of what was measured beside the answers' scores."""
    config, options = content["config"], dict[str, Any]()
    if "similarity" in content:
        options["similarity"] = content["similarity"]["path"]
        options["similarity_revision"] = config.get("similarity_revision")
    # Measured by a later command, perhaps: then the cell's own configuration does not know.
    files = {
        TOKEN_FOLDER: file.parents[2] / TOKEN_FOLDER / f"{file.parent.name}.json",
        "exposure_bias": file.parent / EXPOSURE_FILE,
    }
    for measure in content.get("measures", {}):
        options[measure] = True
        there = files[measure].is_file()
        origin = read_result(files[measure]) if there else config
        if origin.get("teacher") is not None:
            options |= {name: origin.get(name) for name in OF_TEACHER}
    return options


def _as_json(values: Mapping[str, Any]) -> Settings:
    return tuple((name, json.dumps(value)) for name, value in sorted(values.items()))
