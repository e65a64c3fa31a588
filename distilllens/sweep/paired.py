"""Differences of two methods, seed by seed, and how far they stand out of the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distilllens.report.scores.table import Summary
from distilllens.statistics import paired_values, t_interval


@dataclass(frozen=True, kw_only=True)
class PairedDifference(Summary):
    """Method minus baseline, for each seed that both have, at least one.

    Both were trained on the same data in the same order, so what a seed does to both falls out.
    """

    @property
    def standard_error(self) -> float | None:
        """Of the mean difference; None for one seed."""
        return None if self.sd is None else self.sd / math.sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's t interval of the mean difference; None for one seed."""
        return t_interval(self.values)

    @property
    def is_noise(self) -> bool | None:
        """Whether the interval contains 0; None for one seed, where nobody can tell."""
        return None if self.interval is None else self.interval[0] <= 0 <= self.interval[1]


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> PairedDifference | None:
    """Returns the differences over the seeds that both have, None where they share none."""
    differences = paired_values(values, baseline)
    return PairedDifference(values=differences) if differences else None
