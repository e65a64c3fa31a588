"""One number per layer: means over response tokens of what the layers' lenses say.

Shapes: N response tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distilllens.report.lens.readings import LensReadings

BINS = 15
"""Equal bins of confidence: (0, 1/15], (1/15, 2/15], … (Guo et al. 2017, section 2)."""

PerLayer = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A number per layer, and how it is drawn."""

    key: str
    title: str
    unit: str
    meaning: str
    """What it is, and how to read it."""
    scale: str = "linear"
    """linear: the axis begins at 0; share: from 0 to 1; log: a logarithmic axis."""


STATISTICS = (
    Statistic(
        key="entropy",
        title="Entropy",
        unit="nats",
        meaning="How undecided the layer is: −Σ p ln p of its distribution. 0: one token has all "
        "the probability.",
    ),
    Statistic(
        key="nll",
        title="Surprise at the answer's token",
        unit="nats",
        meaning="Mean negative log-likelihood, −ln p(token), of the token that the answer has "
        "next. The last layer's is the model's own loss.",
    ),
    Statistic(
        key="own_agreement",
        title="Agreement with its own last layer",
        unit="share of tokens",
        meaning="Share of tokens at which the layer's likeliest token is that of the same model's "
        "last layer: how early the model has made up its mind.",
        scale="share",
    ),
    Statistic(
        key="teacher_agreement",
        title="Agreement with the teacher's last layer",
        unit="share of tokens",
        meaning="Share of tokens at which the layer's likeliest token is that of the teacher's "
        "last layer.",
        scale="share",
    ),
    Statistic(
        key="accuracy",
        title="Hits: likeliest token is the answer's",
        unit="share of tokens",
        meaning="Share of tokens at which the layer's likeliest token is the answer's.",
        scale="share",
    ),
    Statistic(
        key="calibration_error",
        title="Calibration error",
        unit="ECE",
        meaning="Expected calibration error of the likeliest token against the answer's, 15 equal "
        "bins of confidence: Σ (bin's share) · |hits − mean confidence|. 0: as often right as it "
        "says.",
        scale="share",
    ),
    Statistic(
        key="median_rank",
        title="Median rank of the answer's token",
        unit="rank",
        meaning="1 + the number of tokens that the layer finds likelier than the answer's. 1 is "
        "the top. The median does not mind a few far tokens.",
        scale="log",
    ),
    Statistic(
        key="mean_rank",
        title="Mean rank of the answer's token",
        unit="rank",
        meaning="The same rank's mean: a few far tokens lift it.",
        scale="log",
    ),
)
"""In the order of the page."""


def compute_statistics(
    readings: LensReadings, *, teacher_final_N: NDArray[np.int64]
) -> dict[str, PerLayer]:
    """Returns [L] values for every key of `STATISTICS`, means over the same N tokens.

    Args:
        readings: Of one model.
        teacher_final_N: The likeliest tokens of the teacher's last layer at the same rows.
    """
    top_LN, confidence_LN = readings.top_LNK[..., 0], readings.prob_LNK[..., 0]
    hit_LN = top_LN == readings.gold_N
    return {
        "entropy": readings.entropy_LN.mean(1),
        "nll": readings.nll_LN.mean(1),
        "own_agreement": (top_LN == top_LN[-1]).mean(1),
        "teacher_agreement": (top_LN == teacher_final_N).mean(1),
        "accuracy": hit_LN.mean(1),
        "calibration_error": np.array(
            [
                expected_calibration_error(confidence_N, hit_N)
                for confidence_N, hit_N in zip(confidence_LN, hit_LN, strict=True)
            ]
        ),
        "median_rank": np.median(readings.rank_LN, axis=1),
        "mean_rank": readings.rank_LN.mean(1),
    }


def expected_calibration_error(
    confidence_N: NDArray[np.float64], hit_N: NDArray[np.bool_], *, bins: int = BINS
) -> float:
    """Returns Σ_b (n_b / N) · |accuracy(b) − mean confidence(b)| over bins of equal width.

    Bin b of B holds the confidences in ((b − 1)/B, b/B] (Guo et al. 2017, equation 3).

    Args:
        confidence_N: Probability of the likeliest token, in (0, 1].
        hit_N: Whether that token was right.
        bins: B.

    Returns:
        In [0, 1].
    """
    index_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    # n_b · |accuracy − confidence| is the absolute sum of the differences in the bin.
    gaps = np.bincount(index_N, weights=hit_N - confidence_N, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence_N))


def statistics_rows(
    labels: Sequence[str], statistics: Sequence[Mapping[str, PerLayer]]
) -> list[tuple[str, int, float, list[float]]]:
    """Returns (model, layer from 1, relative depth, values in the order of `STATISTICS`)."""
    rows = []
    for label, values in zip(labels, statistics, strict=True):
        count = len(values[STATISTICS[0].key])
        for layer in range(1, count + 1):
            numbers = [float(values[statistic.key][layer - 1]) for statistic in STATISTICS]
            rows.append((label, layer, layer / count, numbers))
    return rows
