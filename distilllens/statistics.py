"""Intervals and tests of means: over prompts by the bootstrap, over seeds by Student's t.

Two spreads, two questions. Prompts: would another draw of prompts of this kind give the same
answer? There are hundreds, their scores are anything but normal, so they are resampled. Seeds:
would another draw of answers, or another training, give it? There are three or five, too few to
resample, so their differences are taken as normal.

Letters in names: `M` methods, `N` prompts, `R` resamples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats  # type: ignore[import-untyped]

LEVEL = 0.95
"""Share of intervals that hold the true value."""
RESAMPLES = 10_000
SEED = 20260213
"""Of all resampling: the same scores give the same figures."""
BATCH = 2**20
"""Prompts drawn at once: 10,000 times 10,000 in one go would take 1.6 GB."""
ZERO = 1e-12
"""Differences of means smaller than this are rounding, and count as no difference."""

FloatArray = NDArray[np.float64]


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns Student's t interval of the mean at `LEVEL`; None for a single value."""
    if len(values) < 2:
        return None
    mean, n = statistics.fmean(values), len(values)
    # numpy, because statistics.stdev fails on NaN.
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * standard_error
    return mean - half, mean + half


def paired_values(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, ...]:
    """Returns value minus baseline for each key that both have, in the first one's order."""
    return tuple(values[key] - baseline[key] for key in values if key in baseline)


@dataclass(frozen=True, kw_only=True)
class ResampledMean:
    """A mean over prompts, and what it becomes when the prompts are drawn again."""

    mean: float
    draws_R: FloatArray
    """The mean of each resample."""
    variance: float
    """Of the resampled mean, exactly: its second cumulant."""
    third: float
    """Its third cumulant. Cumulants of independent parts add up."""

    def interval(self) -> tuple[float, float]:
        """Returns the BCa interval at `LEVEL` (Efron 1987): of bounded, skewed scores too.

        The acceleration of a mean, which is else found by leaving out each prompt in turn, is a
        sixth of the resampled mean's skewness.
        """
        # Equal values without an exact mean leave the square of a rounding error.
        if self.variance <= (ZERO * max(1.0, abs(self.mean))) ** 2:
            return self.mean, self.mean
        below = np.mean(self.draws_R < self.mean) + np.mean(self.draws_R <= self.mean)
        bias = special.ndtri(below / 2)
        acceleration = self.third / (6 * self.variance**1.5)
        normal = bias + special.ndtri([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        shares = special.ndtr(bias + normal / (1 - acceleration * normal))
        low, high = np.quantile(self.draws_R, shares)
        return float(low), float(high)


def resample_means(values_MN: FloatArray, *, stream: str) -> list[ResampledMean]:
    """Draws as many prompts again, with repetition, `RESAMPLES` times: the same for every row.

    `scipy.stats.bootstrap` draws the same resamples, but gathers each row's values one by one. A
    matrix product of the rows and how often each prompt was drawn is 8 times as fast for 20 rows.

    Args:
        values_MN: Of each method and metric one finite value per prompt, at least two prompts.
        stream: Name of the random numbers, the set's. Rows of one name and one number of prompts
            are drawn with the same prompts, and so may be compared draw by draw. Sets of different
            names are drawn independently.

    Returns:
        One for each row, the same bytes for the same arguments.
    """
    n = values_MN.shape[1]
    rng = np.random.default_rng([SEED, *stream.encode()])
    draws_MR = np.empty((len(values_MN), RESAMPLES))
    size = max(1, BATCH // n)
    for start in range(0, RESAMPLES, size):
        size = min(size, RESAMPLES - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        times_RN = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        draws_MR[:, start : start + size] = values_MN @ times_RN.T.astype(np.float64) / n
    means_M = values_MN.mean(axis=1)
    centred_MN = values_MN - means_M[:, None]
    return [
        ResampledMean(
            mean=float(mean),
            draws_R=draws_R,
            variance=float((centred_N**2).sum() / n**2),
            third=float((centred_N**3).sum() / n**3),
        )
        for mean, draws_R, centred_N in zip(means_M, draws_MR, centred_MN, strict=True)
    ]


def average_means(means: Sequence[ResampledMean]) -> ResampledMean:
    """Returns the mean of means over independent sets, each set resampled on its own."""
    count = len(means)
    return ResampledMean(
        mean=statistics.fmean(part.mean for part in means),
        draws_R=np.mean([part.draws_R for part in means], axis=0),
        variance=sum(part.variance for part in means) / count**2,
        third=sum(part.third for part in means) / count**3,
    )


@dataclass(frozen=True, kw_only=True)
class PairedBootstrap:
    """The difference of two means over the same prompts."""

    mean: float
    interval: tuple[float, float]
    """Percentiles of the resampled differences at `LEVEL`: holds 0 where p is above 1 − LEVEL."""
    share_not_above: float
    """Share of resamples with a difference ≤ 0."""
    p: float
    """Two-sided: twice the smaller of the shares ≤ 0 and ≥ 0, never below 2 / (R + 1)."""

    @property
    def is_noise(self) -> bool:
        """Whether the interval contains 0."""
        return self.interval[0] <= ZERO and self.interval[1] >= -ZERO


def paired_bootstrap(method: ResampledMean, baseline: ResampledMean) -> PairedBootstrap:
    """Compares two means that were drawn with the same prompts (`stream` of `resample_mean`)."""
    differences_R = method.draws_R - baseline.draws_R
    low, high = np.quantile(differences_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    count = len(differences_R)
    not_above, not_below = int((differences_R <= ZERO).sum()), int((differences_R >= -ZERO).sum())
    return PairedBootstrap(
        mean=method.mean - baseline.mean,
        interval=(float(low), float(high)),
        share_not_above=not_above / count,
        # + 1: the scores as they are count as one resample, so no p is 0 (Davison, Hinkley 1997).
        p=min(1.0, 2 * (min(not_above, not_below) + 1) / (count + 1)),
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns p-values corrected for their number (Holm 1979).

    Called better or worse where it is below α, one method of all is so by chance in at most a
    share α of such tables, however the tests depend on each other.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}
