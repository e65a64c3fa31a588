"""Runs that differ in their seed alone, shown as one: a mean with the band from least to most."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilllens.report.runs.record import RunRecord, method_name
from distilllens.report.scores.load import unique_labels

GROUP_ABOVE = 6
"""More runs than this are grouped by seeds: so many lines cannot be told apart."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric of a group; float64, one value for each step."""

    steps: NDArray[np.int64]
    mean: NDArray[np.float64]
    """Over the runs that logged a finite number at this step; NaN where none did."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    bad: NDArray[np.int64]
    """Steps at which a run logged NaN or an infinity."""

    @property
    def has_band(self) -> bool:
        """Whether any step has two different values."""
        return bool(np.any(self.high > self.low))


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """One line of the curves."""

    label: str
    runs: tuple[RunRecord, ...]

    def series(self, key: str) -> Series:
        """Returns a metric over all steps at which any run of the group logged it."""
        logged = [run.series(key) for run in self.runs]
        steps = np.unique(np.concatenate([np.asarray(at, dtype=np.int64) for at, _ in logged]))
        values_RS = np.full((len(logged), len(steps)), np.nan)
        logged_RS = np.zeros_like(values_RS, dtype=bool)
        for row, (at, values) in enumerate(logged):
            values_RS[row, np.searchsorted(steps, at)] = values
            logged_RS[row, np.searchsorted(steps, at)] = True
        finite_RS = np.isfinite(values_RS)
        counts, none = finite_RS.sum(axis=0), ~finite_RS.any(axis=0)
        sums = np.where(finite_RS, values_RS, 0.0).sum(axis=0)
        low = np.where(finite_RS, values_RS, np.inf).min(axis=0)
        high = np.where(finite_RS, values_RS, -np.inf).max(axis=0)
        return Series(
            steps=steps,
            mean=np.where(none, np.nan, sums / np.maximum(counts, 1)),
            low=np.where(none, np.nan, low),
            high=np.where(none, np.nan, high),
            bad=steps[(logged_RS & ~finite_RS).any(axis=0)],
        )

    def keys(self, prefix: str) -> list[str]:
        """Returns the metrics of any of its runs that begin with a prefix, sorted."""
        return sorted({key for run in self.runs for key in run.keys(prefix)})


def group_runs(runs: Sequence[RunRecord]) -> list[RunGroup]:
    """Puts runs of one configuration with several seeds together, if there are many runs.

    Returns:
        Groups in order of their first run; up to six runs stay each on its own.
    """
    if len(runs) <= GROUP_ABOVE:
        return [RunGroup(label=run.label, runs=(run,)) for run in runs]
    members: dict[str, list[RunRecord]] = {}
    for run in runs:
        members.setdefault(repr(_without_seed(run)), []).append(run)
    # A label of one run tells its seed or folder; a group needs what its runs share.
    names = {group[0].folder: _group_name(group) for group in members.values()}
    labels = unique_labels(names)
    return [
        RunGroup(label=labels[group[0].folder], runs=tuple(group)) for group in members.values()
    ]


def _without_seed(run: RunRecord) -> dict[str, Any]:
    """Returns the configuration without what tells runs of one method apart, or how they ran."""
    return {**dataclasses.asdict(run.config), "run": run.config.run.name}


def _group_name(group: Sequence[RunRecord]) -> str:
    name = method_name(group[0].config)
    return name if len(group) == 1 else f"{name} ({len(group)} seeds)"
