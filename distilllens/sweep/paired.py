"""Differences of two methods, seed by seed, and how far they stand out of the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distilllens.report.tables import Summary

LEVEL = 0.95
"""Share of intervals that hold the true mean difference."""


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
        """Student's t interval of the mean difference at `LEVEL`; None for one seed."""
        if self.standard_error is None:
            return None
        half = t_quantile((1 + LEVEL) / 2, self.n - 1) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def is_noise(self) -> bool | None:
        """Whether the interval contains 0; None for one seed, where nobody can tell."""
        return None if self.interval is None else self.interval[0] <= 0 <= self.interval[1]


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> PairedDifference | None:
    """Returns the differences over the seeds that both have, None where they share none."""
    shared = [seed for seed in values if seed in baseline]
    if not shared:
        return None
    return PairedDifference(values=tuple(values[seed] - baseline[seed] for seed in shared))


def t_quantile(probability: float, degrees: int) -> float:
    """Returns the quantile of Student's t distribution, for a probability in [0.5, 1).

    Bisection of `t_central`, which grows with t.
    """
    wanted, low, high = 2 * probability - 1, 0.0, 1.0
    while t_central(high, degrees) < wanted:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_central(middle, degrees) < wanted else (low, middle)
    return (low + high) / 2


def t_central(t: float, degrees: int) -> float:
    """Returns P(|T| ≤ t) for Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine_squared = math.cos(angle) ** 2
    odd = degrees % 2
    total = term = 1.0 if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine_squared * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    return math.sin(angle) * total
