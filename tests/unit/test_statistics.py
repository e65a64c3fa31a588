"""Intervals and tests against scipy, closed forms, full enumeration and simulated truths."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from distilllens.statistics import (
    RESAMPLES,
    SEED,
    ResampledMean,
    average_means,
    holm,
    paired_bootstrap,
    resample_means,
    t_interval,
)


def resample(values: NDArray[np.float64], stream: str = "dolly") -> ResampledMean:
    (resampled,) = resample_means(values[None], stream=stream)
    return resampled


def skewed(n: int, seed: int) -> NDArray[np.float64]:
    """Scores in [0, 1] as Rouge-L gives them: many small ones, few large ones."""
    return np.random.default_rng(seed).beta(0.5, 2.0, n)


# --- One mean -----------------------------------------------------------------------------------


def test_draws_and_bca_interval_are_scipys() -> None:
    values = skewed(60, 1)
    ours = resample(values)
    scipys = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="BCa",
        rng=np.random.default_rng([SEED, *b"dolly"]),
    )  # fmt: skip
    np.testing.assert_allclose(ours.draws_R, scipys.bootstrap_distribution, rtol=1e-12)
    assert ours.interval() == pytest.approx(tuple(scipys.confidence_interval), rel=1e-9)
    # Of skewed scores it is not the percentile interval: the check above could fail.
    assert abs(ours.interval()[1] - np.quantile(ours.draws_R, 0.975)) > 1e-3


def test_bca_interval_of_an_average_of_sets_is_scipys() -> None:
    sets = [skewed(n, n) for n in (50, 30, 80)]
    ours = average_means([resample(values, str(n)) for n, values in enumerate(sets)])
    scipys = stats.bootstrap(
        sets,
        lambda a, b, c, axis: (a.mean(axis=axis) + b.mean(axis=axis) + c.mean(axis=axis)) / 3,
        n_resamples=RESAMPLES,
        method="BCa",
        batch=1000,
        rng=np.random.default_rng(5),
    )
    # Other random numbers: the ends agree within the Monte Carlo error of an end, about
    # 2.7 se / √R for the 2.5 % quantile of a normal distribution; five of them.
    tolerance = 5 * 2.7 * float(scipys.standard_error) / math.sqrt(RESAMPLES)
    assert ours.interval() == pytest.approx(tuple(scipys.confidence_interval), abs=tolerance)
    # The cumulants themselves: a sixth of the skewness is what leaving out prompts gives.
    parts = [len(x) ** -2 * ((x - x.mean()) ** 2).sum() / 9 for x in sets]
    assert ours.variance == pytest.approx(sum(parts))


def test_of_many_prompts_the_interval_is_the_normal_one() -> None:
    values = skewed(4000, 2)
    low, high = resample(values).interval()
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.05 * half)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    samples_MN = np.random.default_rng(3).beta(0.5, 2.0, (300, 100))
    intervals = [resampled.interval() for resampled in resample_means(samples_MN, stream="x")]
    held = sum(low <= 0.2 <= high for low, high in intervals)  # 0.5 / (0.5 + 2)
    # 99.9 % of Binomial(300, 0.95).
    assert stats.binom.ppf(0.0005, 300, 0.95) <= held <= stats.binom.ppf(0.9995, 300, 0.95)


def test_equal_values_have_no_spread() -> None:
    assert resample(np.full(7, 3.25)).interval() == (3.25, 3.25)


@pytest.mark.parametrize("n", [3, 20, 80, 252])
def test_equal_values_that_have_no_exact_mean_have_no_spread(n: int) -> None:
    """Sums of 700 / 11 round, so the variance is not 0 but about 1e-32 of its square."""
    for value in (700 / 11, 100 / 3, 1e-9 / 3, 1e6 / 7):
        low, high = resample(np.full(n, value)).interval()
        assert (low, high) == pytest.approx((value, value), rel=1e-12)
    almost = resample(np.full(n, 700 / 11) + 1e-6 * np.arange(n))
    assert almost.interval()[0] < almost.mean < almost.interval()[1]


def test_the_same_scores_give_the_same_bytes_and_sets_are_drawn_independently() -> None:
    values = skewed(500, 4)
    first, again, other = resample(values), resample(values), resample(values, "vicuna")
    assert first.draws_R.tobytes() == again.draws_R.tobytes()
    assert abs(np.corrcoef(first.draws_R, other.draws_R)[0, 1]) < 5 / math.sqrt(RESAMPLES)


def test_ten_thousand_prompts_fit_into_little_memory() -> None:
    values_MN = np.random.default_rng(0).random((3, 10_000))
    tracemalloc.start()
    resample_means(values_MN, stream="uinst")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6  # all indices at once: 800 MB


def test_a_single_seed_has_no_interval() -> None:
    assert t_interval([1.0]) is None
    assert t_interval([3.0, 5.0]) == pytest.approx((4 - 12.7062, 4 + 12.7062), abs=1e-4)


# --- Two means on the same prompts --------------------------------------------------------------


@pytest.mark.parametrize("values", [(-1.0, 0.5, 2.0), (-3.0, 1.0, 1.5), (0.0, 0.0, 1.0)])
def test_shares_are_those_of_all_27_resamples(values: tuple[float, ...]) -> None:
    baseline = np.array([0.4, 0.1, 0.2])
    method_draws, baseline_draws = resample_means(
        np.stack([baseline + values, baseline]), stream="x"
    )
    found = paired_bootstrap(method_draws, baseline_draws)
    sums = [sum(drawn) for drawn in itertools.product(values, repeat=3)]
    not_above = sum(total <= 1e-9 for total in sums) / 27
    not_below = sum(total >= -1e-9 for total in sums) / 27

    def error(share: float) -> float:
        return 4 * math.sqrt(share * (1 - share) / RESAMPLES) + 1 / RESAMPLES

    assert found.share_not_above == pytest.approx(not_above, abs=error(not_above))
    smaller = min(not_above, not_below)
    assert found.p == pytest.approx(min(1, 2 * smaller), abs=2 * error(smaller) + 2 / RESAMPLES)
    assert found.mean == pytest.approx(sum(values) / 3)
    # Of 27 equally likely means the 2.5 % and 97.5 % quantiles are the smallest and the largest.
    assert found.interval == pytest.approx((min(values), max(values)))


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2, 0.3, -0.25])
def test_p_values_are_those_of_the_t_test_on_normal_scores(shift: float) -> None:
    rng = np.random.default_rng(6)
    baseline = rng.normal(size=200)
    method = baseline + rng.normal(loc=shift, size=200)
    found = paired_bootstrap(*resample_means(np.stack([method, baseline]), stream="x"))
    wanted = stats.ttest_rel(method, baseline)
    # Monte Carlo error of p, and the t distribution of 199 degrees against the normal one.
    error = 5 * math.sqrt(2 * wanted.pvalue / RESAMPLES) + 0.05 * wanted.pvalue + 3e-4
    assert found.p == pytest.approx(wanted.pvalue, abs=error)
    # The half width is about 2 · √(1/200) = 0.14; an end's Monte Carlo error 0.002.
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval()), abs=0.01)
    assert found.is_noise == (found.p > 0.05)


def test_pairing_takes_out_what_the_prompts_share() -> None:
    rng = np.random.default_rng(7)
    baseline = rng.normal(scale=10, size=100)
    method = baseline + 0.5 + rng.normal(scale=0.5, size=100)
    drawn = resample_means(np.stack([method, baseline]), stream="x")
    assert not paired_bootstrap(*drawn).is_noise
    (other,) = resample_means(baseline[None], stream="other prompts")
    assert paired_bootstrap(drawn[0], other).is_noise


def test_a_true_difference_of_zero_is_noise_about_19_times_in_20() -> None:
    rng = np.random.default_rng(8)
    methods_MN, baselines_MN = rng.beta(0.5, 2, (2, 300, 80))
    drawn = zip(
        resample_means(methods_MN, stream="x"),
        resample_means(baselines_MN, stream="x"),
        strict=True,
    )
    found = [paired_bootstrap(*pair) for pair in drawn]
    noise = sum(one.is_noise for one in found)
    assert stats.binom.ppf(0.0005, 300, 0.95) <= noise <= stats.binom.ppf(0.9995, 300, 0.95)


def test_the_same_answers_do_not_differ() -> None:
    values = skewed(50, 9)
    found = paired_bootstrap(*resample_means(np.stack([values, values]), stream="x"))
    assert (found.mean, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)
    assert found.is_noise


def test_holm_worked_out_by_hand() -> None:
    # Sorted: 0.005 · 4, 0.01 · 3, 0.03 · 2, 0.04 · 1, which may not fall below 0.06.
    wanted = {"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.005}
    assert holm(wanted) == pytest.approx({"c": 0.06, "a": 0.03, "d": 0.06, "b": 0.02})
    assert list(holm(wanted)) == list(wanted)
    assert holm({"a": 0.4, "b": 0.9}) == {"a": 0.8, "b": 0.9}
    assert holm({"a": 0.04}) == {"a": 0.04}
    assert holm({}) == {}
