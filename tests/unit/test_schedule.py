"""The learning rate and the lens's shares at chosen steps, in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilllens.config import LensConfig, OptimConfig
from distilllens.training.schedule import learning_rate, lens_shares, warmup_steps

COSINE = OptimConfig(lr=1.0, lr_min=0.2, schedule="cosine")
LINEAR = OptimConfig(lr=1.0, lr_min=0.2, schedule="linear")
CONSTANT = OptimConfig(lr=1.0, lr_min=0.2, schedule="constant")


@pytest.mark.parametrize(
    ("optim", "step", "expected"),
    [
        (COSINE, 0, 1.0),
        (COSINE, 25, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2),
        (COSINE, 50, 0.6),
        (COSINE, 75, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2),
        (COSINE, 100, 0.2),
        (LINEAR, 0, 1.0),
        (LINEAR, 25, 0.8),
        (LINEAR, 99, 0.208),
        (LINEAR, 100, 0.2),
        (CONSTANT, 0, 1.0),
        (CONSTANT, 99, 1.0),
    ],
)
def test_without_warmup(optim: OptimConfig, step: int, expected: float) -> None:
    assert learning_rate(optim, step, 100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [20, 0.2], ids=["steps", "share"])
def test_warmup_rises_in_a_line_and_then_the_course_begins(schedule: str, warmup: float) -> None:
    optim = OptimConfig(lr=1.0, lr_min=0.2, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    rates = [learning_rate(optim, step, 100) for step in range(101)]
    assert rates[:20] == pytest.approx([0.05 * k for k in range(1, 21)])
    assert rates[20] == 1.0
    assert rates[60] == pytest.approx({"cosine": 0.6, "linear": 0.6, "constant": 1.0}[schedule])
    assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.2)


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0, 100, 0), (0.03, 100, 3), (0.999, 1000, 999), (1, 100, 1), (500, 100, 100), (7.9, 100, 7)],
)
def test_warmup_as_steps_or_share(warmup: float, total: int, steps: int) -> None:
    assert warmup_steps(OptimConfig(warmup=warmup), total) == steps


def test_a_run_of_warmup_only_and_of_one_step() -> None:
    assert learning_rate(OptimConfig(lr=1.0, warmup=50), 9, 10) == 1.0
    assert learning_rate(OptimConfig(lr=1.0, warmup=50), 4, 10) == 0.5
    assert learning_rate(COSINE, 0, 1) == 1.0


@given(
    total=st.integers(1, 5000),
    warmup=st.floats(0, 0.99) | st.integers(1, 6000),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_never_above_the_peak_and_never_back_up(total: int, warmup: float, schedule: str) -> None:
    optim = OptimConfig(lr=3e-4, lr_min=1e-6, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    first = warmup_steps(optim, total)
    samples = sorted({0, first, total - 1, *range(0, total, max(1, total // 20))})
    rates = {step: learning_rate(optim, step, total) for step in samples}
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates.values())
    course = [rate for step, rate in rates.items() if step >= first]
    assert all(after <= before for before, after in itertools.pairwise(course))
    assert all(rate >= 1e-6 for rate in course)


# --- The lens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "share", "expected"),
    [
        ("constant", 0.5, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("ramp", 0.5, [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1]),
        ("decay", 0.5, [1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0]),
        ("ramp", 1.0, [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8]),
        ("decay", 1.0, [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        ("ramp", 0.01, [0, 1, 1, 1, 1, 1, 1, 1]),
        ("decay", 0.01, [1, 1, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_course_of_the_lens(schedule: str, share: float, expected: list[float]) -> None:
    """The same for all pairs."""
    lens = LensConfig(schedule=schedule, schedule_share=share, coeff=7.0)  # type: ignore[arg-type]
    for step, value in enumerate(expected):
        assert lens_shares(lens, 3, step, 8) == pytest.approx([value] * 3)
        assert lens_shares(lens, 0, step, 8) == []


@pytest.mark.parametrize(
    ("share", "turns"),
    [
        # Two steps a pair: half way up, up, and then the next.
        (0.75, [(0, 0, 0), (0.5, 0, 0), (1, 0, 0), (1, 0.5, 0), (1, 1, 0), (1, 1, 0.5), (1, 1, 1)]),
        # 4 steps for 3 pairs: 3/4 of a pair each step.
        (0.5, [(0, 0, 0), (0.75, 0, 0), (1, 0.5, 0), (1, 1, 0.25), (1, 1, 1), (1, 1, 1)]),
        (0.01, [(0, 0, 0), (1, 1, 1)]),
    ],
)
def test_pairs_join_one_after_another(share: float, turns: list[tuple[float, ...]]) -> None:
    """Eight steps, three pairs."""
    deep = LensConfig(schedule="deepest_first", schedule_share=share)
    shallow = LensConfig(schedule="shallowest_first", schedule_share=share)
    for step, expected in enumerate([*turns, (1, 1, 1)]):
        assert lens_shares(shallow, 3, step, 8) == pytest.approx(expected)
        assert lens_shares(deep, 3, step, 8) == pytest.approx(expected[::-1])
    assert lens_shares(shallow, 3, 7, 8) == lens_shares(deep, 3, 7, 8) == [1.0] * 3


@given(
    total=st.integers(1, 500),
    share=st.floats(1e-3, 1),
    pairs=st.integers(1, 9),
    order=st.sampled_from(["deepest_first", "shallowest_first"]),
)
def test_joining_pairs_weigh_as_a_ramp_in_all(
    total: int, share: float, pairs: int, order: str
) -> None:
    joining = LensConfig(schedule=order, schedule_share=share)  # type: ignore[arg-type]
    ramp = LensConfig(schedule="ramp", schedule_share=share)
    before = [0.0] * pairs
    for step in range(total):
        shares = lens_shares(joining, pairs, step, total)
        (mean,) = lens_shares(ramp, 1, step, total)
        assert sum(shares) / pairs == pytest.approx(mean, abs=1e-9)
        assert all(0 <= old <= new <= 1 for old, new in zip(before, shares, strict=True))
        assert shares == sorted(shares, reverse=order == "shallowest_first")
        assert sum(0 < value < 1 for value in shares) <= 1
        before = shares


@given(total=st.integers(1, 5000), share=st.floats(1e-4, 1))
def test_the_lens_rises_and_falls_in_lines(total: int, share: float) -> None:
    ramp = LensConfig(schedule="ramp", schedule_share=share)
    decay = LensConfig(schedule="decay", schedule_share=share)
    rising, falling = (
        [lens_shares(lens, 1, step, total)[0] for step in range(total)] for lens in (ramp, decay)
    )
    assert rising[0] == 0.0 and all(0 <= value <= 1 for value in rising)
    climbs = [after - before for before, after in itertools.pairwise(rising)]
    whole = [climb for climb in climbs if climb > 1e-9][:-1]  # the last one may be cut off at 1
    assert all(climb == pytest.approx(climbs[0], rel=1e-6) for climb in whole)
    assert rising.count(1.0) == pytest.approx(max(0, total - share * total), abs=1)
    assert falling == rising[::-1]
