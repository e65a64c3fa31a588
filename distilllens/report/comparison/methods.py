"""Methods against a baseline on the same prompts, and how far each mean stands out of the noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distilllens.report.comparison.prompt_scores import PromptScores, read_prompt_scores
from distilllens.report.scores.load import Method, list_some
from distilllens.report.scores.metrics import metric_of
from distilllens.report.scores.table import average_by_unit
from distilllens.statistics import (
    LEVEL,
    PairedBootstrap,
    ResampledMean,
    average_means,
    holm,
    paired_bootstrap,
    paired_values,
    resample_means,
    t_interval,
)

AVERAGE = "average"
"""Name of the column over all sets."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A method's mean on one set, or over all sets."""

    resampled: ResampledMean
    num_prompts: int
    num_seeds: int
    """Answers per prompt that its value is the mean of."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method minus the baseline, on one set or over all."""

    method: str
    num_prompts: int
    num_seeds: tuple[int, int]
    """Of the method and of the baseline."""
    bootstrap: PairedBootstrap
    p_holm: float
    """Corrected for the number of methods that are compared in this column."""
    num_methods: int
    """That number."""
    seed_differences: tuple[float, ...]
    """Seed by seed, for the seeds (sampling or training) that both have."""

    @property
    def seed_interval(self) -> tuple[float, float] | None:
        """Student's t interval over the seeds; None for fewer than two."""
        return t_interval(self.seed_differences)

    @property
    def noise(self) -> str:
        """In which noise the difference lies; empty where it stands out of all that are known."""
        if self.bootstrap.is_noise:
            return "under the noise"
        if self.p_holm >= 1 - LEVEL:
            return f"under the noise of {self.num_methods} comparisons"
        interval = self.seed_interval
        if interval is not None and interval[0] <= 0 <= interval[1]:
            return "under the noise of the seeds"
        return ""

    def verdict(self, metric: str) -> str:
        """Returns what can be said: better, worse, or in which noise the difference lies."""
        if self.noise:
            return self.noise
        is_larger = self.bootstrap.mean > 0
        better = metric_of(metric).better
        if better is None:
            word = "larger" if is_larger else "smaller"
        else:
            word = "better" if is_larger == (better == "larger") else "worse"
        return word if self.seed_interval is not None else f"{word} (seeds not tested)"


@dataclass(frozen=True, kw_only=True)
class MetricComparison:
    """One metric of all methods."""

    metric: str
    baseline: str
    columns: tuple[str, ...]
    """The sets, `AVERAGE` after them where it is over several."""
    means: Mapping[str, Mapping[str, Sampled]]
    """By method and column; missing where there are no samples."""
    comparisons: Mapping[str, Sequence[Comparison]]
    """By column, in the order of the methods."""

    def warning(self) -> str | None:
        """Returns which differences of the last column that has any are under the noise.

        None for no such.
        """
        column = next((name for name in reversed(self.columns) if self.comparisons[name]), "")
        found = [c for c in self.comparisons.get(column, ()) if c.noise]
        if not found:
            return None
        told = list_some(
            (
                f"{c.method} {c.bootstrap.mean:+.2f} ({c.bootstrap.interval[0]:+.2f} to "
                f"{c.bootstrap.interval[1]:+.2f}, {c.noise})"
                for c in found
            ),
            separator="; ",
        )
        prompts = ", ".join(str(n) for n in sorted({c.num_prompts for c in found}))
        return (
            f"{metric_of(self.metric).title}, {column}: no difference to {self.baseline} can be "
            f"told from noise for {told}; n = {prompts} prompts"
        )


def compare_methods(
    methods: Sequence[Method],
    *,
    sets: Sequence[str],
    metrics: Sequence[str],
    baseline: Method,
    averaged: Sequence[str] | None = None,
) -> tuple[list[MetricComparison], list[str]]:
    """Resamples every method's prompts, and compares each with the baseline.

    Given models (the teacher) get means but no comparison. A set whose prompts are not the
    baseline's is not compared, and told.

    Args:
        methods: The baseline among them.
        sets: Test sets, in the order of the tables.
        metrics: Names of results.json; those that are known to be no mean over prompts are left
            out.
        baseline: What the others are compared with.
        averaged: The sets that the average is over; default: all.

    Returns:
        One for each metric, and what could not be computed.

    Raises:
        DataError: A broken samples.jsonl.
    """
    averaged = sets if averaged is None else averaged
    metrics = [metric for metric in metrics if metric_of(metric).per_prompt]
    read: dict[str, dict[str, PromptScores]] = {}
    notes: list[str] = []
    for method in methods:
        read[method.label] = {}
        for test_set in (name for name in sets if name in method.test_sets):
            scores, told = read_prompt_scores(method, test_set, metrics)
            notes += told
            if scores is not None:
                read[method.label][test_set] = scores
    rivals = [m for m in methods if m.label != baseline.label and not m.is_given]
    shared = {rival.label: _same_prompts(rival, baseline, read, notes) for rival in rivals}
    resampled = _resample(read, metrics)
    found = []
    for metric in metrics:
        means = {
            label: _with_average(own[metric], sets, averaged) for label, own in resampled.items()
        }
        if any(means.values()):
            columns = (*sets, AVERAGE) if len(averaged) > 1 else tuple(sets)
            found.append(
                _compare(
                    metric,
                    rivals,
                    baseline,
                    columns=columns,
                    averaged=averaged,
                    means=means,
                    shared=shared,
                )
            )
    return found, notes


def _same_prompts(
    rival: Method,
    baseline: Method,
    read: Mapping[str, Mapping[str, PromptScores]],
    notes: list[str],
) -> set[str]:
    """Returns the sets on which both answered the same prompts; adds to the notes which not."""
    own, other = read[rival.label], read[baseline.label]
    same = set()
    for name in (name for name in own if name in other):
        if np.array_equal(own[name].prompts_N, other[name].prompts_N):
            same.add(name)
        else:
            alike = len(np.intersect1d(own[name].prompts_N, other[name].prompts_N))
            notes.append(
                f"{name}: {rival.label} and {baseline.label} were not asked the same prompts "
                f"({alike} of {len(own[name].prompts_N)} and {len(other[name].prompts_N)} are in "
                f"both by index and text), so they are not compared on it"
            )
    return same


def _resample(
    read: Mapping[str, Mapping[str, PromptScores]], metrics: Sequence[str]
) -> dict[str, dict[str, dict[str, Sampled]]]:
    """Returns the means by method, metric and set, of sets with at least two prompts.

    All methods and metrics of one set and the same prompts are drawn at once.
    """
    together: dict[tuple[str, bytes], list[tuple[str, str]]] = defaultdict(list)
    for label, by_set in read.items():
        for name, scores in by_set.items():
            if len(scores.prompts_N) > 1:
                group = together[name, scores.prompts_N.tobytes()]
                group += [(label, metric) for metric in metrics if metric in scores.values]
    found: dict[str, dict[str, dict[str, Sampled]]] = {
        label: {metric: {} for metric in metrics} for label in read
    }
    for (name, _), rows in together.items():
        if not rows:
            continue
        values_MN = np.stack([read[label][name].values[metric] for label, metric in rows])
        for (label, metric), resampled in zip(
            rows, resample_means(values_MN, stream=name), strict=True
        ):
            scores = read[label][name]
            found[label][metric][name] = Sampled(
                resampled=resampled,
                num_prompts=len(scores.prompts_N),
                num_seeds=scores.num_seeds,
            )
    return found


def _with_average(
    by_set: Mapping[str, Sampled], sets: Sequence[str], averaged: Sequence[str]
) -> dict[str, Sampled]:
    """Returns the means in the order of the sets, and the average where none of its is missing."""
    found = {name: by_set[name] for name in sets if name in by_set}
    parts = [by_set[name] for name in averaged if name in by_set]
    if len(averaged) > 1 and len(parts) == len(averaged):
        found[AVERAGE] = Sampled(
            resampled=average_means([sampled.resampled for sampled in parts]),
            num_prompts=sum(sampled.num_prompts for sampled in parts),
            num_seeds=min(sampled.num_seeds for sampled in parts),
        )
    return found


def _compare(
    metric: str,
    rivals: Sequence[Method],
    baseline: Method,
    *,
    columns: tuple[str, ...],
    averaged: Sequence[str],
    means: Mapping[str, Mapping[str, Sampled]],
    shared: Mapping[str, set[str]],
) -> MetricComparison:
    comparisons: dict[str, list[Comparison]] = {}
    for column in columns:
        needed = set(averaged) if column == AVERAGE else {column}
        able = [
            rival
            for rival in rivals
            if needed <= shared[rival.label]
            and column in means[rival.label]
            and column in means[baseline.label]
        ]
        rows = [_compare_pair(metric, rival, baseline, column, averaged, means) for rival in able]
        corrected = holm({row.method: row.bootstrap.p for row in rows})
        comparisons[column] = [
            replace(row, p_holm=corrected[row.method], num_methods=len(rows)) for row in rows
        ]
    return MetricComparison(
        metric=metric,
        baseline=baseline.label,
        columns=columns,
        means=means,
        comparisons=comparisons,
    )


def _compare_pair(
    metric: str,
    rival: Method,
    baseline: Method,
    column: str,
    averaged: Sequence[str],
    means: Mapping[str, Mapping[str, Sampled]],
) -> Comparison:
    own, other = means[rival.label][column], means[baseline.label][column]
    bootstrap = paired_bootstrap(own.resampled, other.resampled)
    # Sampling seeds of one training and training seeds are different things: never paired.
    is_paired = rival.by_training == baseline.by_training
    return Comparison(
        method=rival.label,
        num_prompts=own.num_prompts,
        num_seeds=(own.num_seeds, other.num_seeds),
        bootstrap=bootstrap,
        p_holm=bootstrap.p,
        num_methods=1,
        seed_differences=paired_values(
            _seed_values(rival, metric, column, averaged),
            _seed_values(baseline, metric, column, averaged),
        )
        if is_paired
        else (),
    )


def _seed_values(
    method: Method, metric: str, column: str, averaged: Sequence[str]
) -> Mapping[int, float]:
    by_unit = method.by_unit(metric)
    if column == AVERAGE:
        return average_by_unit({name: by_unit.get(name, {}) for name in averaged})
    return by_unit.get(column, {})
