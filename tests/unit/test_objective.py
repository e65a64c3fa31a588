"""Weights of the loss's terms, and its named parts, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distilllens.config import HiddenConfig, LensConfig, ObjectiveConfig
from distilllens.errors import ConfigError
from distilllens.layers import LayerPair
from distilllens.objective import DistillationObjective, Rows

PAIRS = [LayerPair(4, 1), LayerPair(8, 12)]
TARGETS = torch.tensor([1, 2, 3])


def rows(width: int, count: int = 2) -> Rows:
    return Rows(
        torch.full((3, width), 0.0), [torch.full((3, width), 1.0 + k) for k in range(count)]
    )


def objective(lens: dict[str, Any] | None = None, **options: Any) -> DistillationObjective:
    return DistillationObjective(ObjectiveConfig(lens=LensConfig(**(lens or {})), **options), PAIRS)


@pytest.mark.parametrize("approach", ["sft", "seqkd"])
def test_sft_is_cross_entropy_alone(approach: str) -> None:
    sft = objective(approach=approach, kd_ratio=0.5)
    assert not sft.needs_teacher and sft.pairs == ()
    (term,) = sft.terms(rows(4, 0), None, TARGETS, scale=3.0)
    assert term.cross_entropy_weight == 3.0
    assert term.kind is None and term.teacher_hidden_NE is None
    assert term.targets_N is TARGETS
    assert sft.losses([[6.0, 99.0]], 3) == {"loss": 2.0, "loss/ce": 2.0}


def test_kd_weighs_by_ratio_and_squared_temperature() -> None:
    kd = objective(approach="kd", kd_ratio=0.3, temperature=2.0, divergence="fkl")
    assert kd.needs_teacher and kd.pairs == ()
    (term,) = kd.terms(rows(4, 0), rows(6, 0), TARGETS, scale=10.0)
    assert term.kind == "fkl" and term.options.temperature == 2.0
    assert term.divergence_weight == pytest.approx(10 * 0.3 * 4)
    assert term.cross_entropy_weight == pytest.approx(10 * 0.7)
    losses = kd.losses([[12.0, 6.0]], 3)
    assert losses == pytest.approx({"loss": 0.7 * 4 + 1.2 * 2, "loss/ce": 4.0, "loss/kd": 2.0})


def test_lens_terms() -> None:
    lens = objective(
        {"coeff": 0.5, "weights": [1.0, 3.0], "beta": 0.2, "alpha": 0.3, "train_head": False},
        kd_ratio=0.3,
        temperature=2.0,
        beta=0.9,
        alpha=0.4,
    )
    student, teacher = rows(4), rows(6)
    final, first, second = lens.terms(student, teacher, TARGETS, scale=10.0)
    assert (final.kind, final.options.beta, final.train_head) == ("rkl", 0.9, True)
    for term, number, weight in ((first, 0, 0.5), (second, 1, 1.5)):  # scaled to a mean of 1
        assert term.kind == "jsd"
        assert (term.options.temperature, term.options.beta, term.options.alpha) == (1.0, 0.2, 0.3)
        assert term.divergence_weight == pytest.approx(10 * 0.3 * 0.5 * weight / 2)
        assert term.cross_entropy_weight == 0.0 and term.targets_N is None
        assert not term.train_head
        assert term.student_hidden_ND is student.layers[number]
        assert term.teacher_hidden_NE is teacher.layers[number]


def test_the_lens_has_a_top_k_of_its_own() -> None:
    final, first, second = objective({"top_k": 4}, top_k=32).terms(
        rows(4), rows(6), TARGETS, scale=1.0
    )
    assert [term.options.top_k for term in (final, first, second)] == [32, 4, 4]
    final, first, _ = objective(top_k=32).terms(rows(4), rows(6), TARGETS, scale=1.0)
    assert (final.options.top_k, first.options.top_k) == (32, None)


def test_named_losses_from_sums() -> None:
    lens = objective({"coeff": 0.5, "weights": [1.0, 3.0]}, kd_ratio=0.3, temperature=2.0)
    losses = lens.losses([[20.0, 8.0], [0.0, 4.0], [0.0, 12.0]], 4)
    assert losses == pytest.approx(
        {
            "loss/ce": 5.0,
            "loss/kd": 2.0,
            "lens/jsd/L01": 1.0,
            "lens/jsd/L12": 3.0,
            "loss/lens": 2.5,  # (0.5 · 1 + 1.5 · 3) / 2
            "loss": 0.7 * 5 + 0.3 * (4 * 2 + 0.5 * 2.5),
        }
    )


def test_broken_numbers_are_not_hidden() -> None:
    lens = objective()
    losses = lens.losses([[8.0, 8.0], [0.0, math.nan], [0.0, 4.0]], 4)
    assert math.isnan(losses["loss"]) and math.isnan(losses["lens/jsd/L01"])
    assert losses["lens/jsd/L12"] == 1.0 and losses["loss/kd"] == 2.0
    assert lens.losses([[0.0, 0.0]] * 3, 0)["loss"] == 0.0


@pytest.mark.parametrize(
    ("options", "lens", "needs_teacher"),
    [
        ({"approach": "kd"}, {}, True),
        ({"approach": "sft"}, {}, False),
        ({"kd_ratio": 0.0}, {}, False),
        ({}, {"coeff": 0.0}, True),
    ],
)
def test_without_a_lens_no_layer_is_read(
    options: dict[str, Any], lens: dict[str, Any], needs_teacher: bool
) -> None:
    built = objective(lens, **options)
    assert built.pairs == () and built.lens_weights == []
    assert built.needs_teacher == needs_teacher


@given(
    ratio=st.floats(0.01, 1),
    coeff=st.floats(0.01, 10),
    temperature=st.floats(0.1, 10),
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=2),
    sums=st.lists(st.floats(0, 1e3), min_size=4, max_size=4),
)
def test_the_reported_loss_is_the_one_that_is_trained(
    ratio: float, coeff: float, temperature: float, weights: list[float], sums: list[float]
) -> None:
    """What terms() weighs and losses() reports are written separately; they must agree."""
    built = objective({"coeff": coeff, "weights": weights}, kd_ratio=ratio, temperature=temperature)
    ce, kd, *lens = sums
    final, *layers = built.terms(rows(4), rows(4), TARGETS, scale=1 / 7)
    trained = final.cross_entropy_weight * ce + final.divergence_weight * kd
    trained += sum(term.divergence_weight * value for term, value in zip(layers, lens, strict=True))
    reported = built.losses([[ce, kd], [0.0, lens[0]], [0.0, lens[1]]], 7)["loss"]
    assert trained == pytest.approx(reported, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([1.0], r"lens\.weights has 1 entries \[1\.0\], but there are 2 pairs"),
        ([], r"has 0 entries \[\], but there are 2 pairs"),
        ([1.0, -1.0], r"lens\.weights=\[1\.0, -1\.0\] must be ≥ 0 and not all 0"),
        ([0.0, 0.0], "must be ≥ 0 and not all 0"),
        ([math.nan, 1.0], "must be ≥ 0 and not all 0"),
    ],
)
def test_refused_weights(weights: list[float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        objective({"weights": weights})


def test_a_pair_may_weigh_nothing() -> None:
    assert objective({"weights": [0.0, 2.0]}).lens_weights == [0.0, 1.0]


# --- Weights by depth and by step ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "layers", "expected"),
    [
        ("deeper", [2, 4, 6], [0.5, 1.0, 1.5]),
        ("shallower", [2, 4, 6], [1.5, 1.0, 0.5]),
        ("deeper", [1, 2, 9], [3 / 12, 6 / 12, 27 / 12]),
        ("shallower", [1, 2, 9], [27 / 18, 24 / 18, 3 / 18]),  # 10 − l: 9, 8, 1 of 18
        ("deeper", [5], [1.0]),
        ("shallower", [5], [1.0]),
        ("equal", [2, 4, 6], [1.0, 1.0, 1.0]),
    ],
)
def test_weights_by_depth(order: str, layers: list[int], expected: list[float]) -> None:
    config = ObjectiveConfig(lens=LensConfig(depth_weights=order, coeff=3.0))  # type: ignore[arg-type]
    built = DistillationObjective(config, [LayerPair(2 * n, n) for n in layers])
    assert built.lens_weights == pytest.approx([3 * w / len(layers) for w in expected])


def test_the_shares_of_a_step_weigh_the_lens_alone() -> None:
    lens = objective({"coeff": 0.5}, kd_ratio=0.3)
    whole = lens.terms(rows(4), rows(6), TARGETS, scale=10.0)
    part = lens.terms(rows(4), rows(6), TARGETS, scale=10.0, lens_shares=[0.25, 0.75])
    for before, after, factor in zip(whole, part, (1, 0.25, 0.75), strict=True):
        assert after.divergence_weight == pytest.approx(factor * before.divergence_weight)
        assert after.cross_entropy_weight == before.cross_entropy_weight


def test_the_mean_over_pairs_counts_those_that_have_not_joined() -> None:
    """λ / 2 for the one of two pairs that is there, not λ."""
    lens = objective({"coeff": 3.0})
    _, shallow, deep = lens.terms(rows(4), rows(6), TARGETS, scale=1.0, lens_shares=[0.0, 1.0])
    assert (shallow.divergence_weight, deep.divergence_weight) == (0.0, 1.5)


def test_the_loss_of_steps_with_different_shares() -> None:
    """λ = 0.5, of two pairs first 0.2 and 0.6, then 0.8 and 1; the parts are means of both steps.

    The last row is of hidden states, which no share weighs.
    """
    hidden = HiddenConfig(coeff=2.0)
    lens = objective({"coeff": 0.5, "weights": [1.0, 3.0]}, kd_ratio=0.3, hidden=hidden)
    first = torch.tensor([[20.0, 8.0], [0.0, 4.0], [0.0, 12.0], [0.0, 1.0], [0.0, 3.0]])
    second = torch.tensor([[10.0, 6.0], [0.0, 2.0], [0.0, 6.0], [0.0, 5.0], [0.0, 7.0]])
    scheduled = lens.scheduled(first, [0.2, 0.6]) + lens.scheduled(second, [0.8, 1.0])
    losses = lens.losses((first + second).tolist(), 4, scheduled.tolist())
    one = 0.7 * 20 + 0.3 * (8 + 0.5 * (0.2 * 0.5 * 4 + 0.6 * 1.5 * 12) / 2 + 2 * (1 + 3) / 2)
    other = 0.7 * 10 + 0.3 * (6 + 0.5 * (0.8 * 0.5 * 2 + 1.0 * 1.5 * 6) / 2 + 2 * (5 + 7) / 2)
    assert losses["loss"] == pytest.approx((one + other) / 4)
    assert losses["loss/lens"] == pytest.approx((0.5 * 6 + 1.5 * 18) / 2 / 4)


def test_named_coefficients_of_a_schedule() -> None:
    assert objective({"coeff": 3.0}).lens_coefficients([1.0, 1.0]) == {}
    assert objective(approach="kd").lens_coefficients([]) == {}
    ramp = objective({"coeff": 3.0, "schedule": "ramp"})
    assert ramp.lens_coefficients([0.5, 0.5]) == {"lens_coeff": 1.5}
    joining = objective({"coeff": 3.0, "schedule": "deepest_first", "weights": [1.0, 3.0]})
    assert joining.lens_coefficients([0.5, 1.0]) == {
        "lens_coeff": 2.25,
        "lens_coeff/deepest_first/L01": 1.5,
        "lens_coeff/deepest_first/L12": 3.0,
    }


# --- Hidden states ------------------------------------------------------------------------------


def test_hidden_states_beside_the_lens() -> None:
    hidden = HiddenConfig(coeff=3.0, loss="cosine")
    both = objective({"coeff": 0.5, "weights": [1.0, 3.0]}, kd_ratio=0.3, hidden=hidden)
    assert both.pairs == both.lens_pairs == both.hidden_pairs == tuple(PAIRS)
    assert both.num_sums == 5 and both.hidden_weight == pytest.approx(0.3 * 3 / 2)
    assert len(both.terms(rows(4), rows(6), TARGETS, scale=1.0)) == 3
    sums = [[20.0, 8.0], [0.0, 4.0], [0.0, 12.0], [0.0, 2.0], [0.0, 10.0]]
    losses = both.losses(sums, 4)
    assert losses == pytest.approx(
        {
            "loss/ce": 5.0,
            "loss/kd": 2.0,
            "lens/jsd/L01": 1.0,
            "lens/jsd/L12": 3.0,
            "loss/lens": 2.5,
            "hidden/cosine/L01": 0.5,
            "hidden/cosine/L12": 2.5,
            "loss/hidden": 1.5,
            "loss": 0.7 * 5 + 0.3 * (2 + 0.5 * 2.5 + 3 * 1.5),
        }
    )


@pytest.mark.parametrize(
    ("approach", "lens"), [("kd", {"weights": [1.0]}), ("distill_lens", {"coeff": 0.0})]
)
def test_hidden_states_without_the_lens(approach: str, lens: dict[str, Any]) -> None:
    alone = objective(lens, approach=approach, kd_ratio=0.5, hidden=HiddenConfig(coeff=2.0))
    assert alone.pairs == alone.hidden_pairs == tuple(PAIRS) and alone.lens_pairs == ()
    assert alone.needs_pairs and alone.num_sums == 3
    assert len(alone.terms(rows(4), rows(6), TARGETS, scale=1.0)) == 1
    losses = alone.losses([[4.0, 8.0], [0.0, 12.0], [0.0, 4.0]], 4)
    assert losses == pytest.approx(
        {
            "loss/ce": 1.0,
            "loss/kd": 2.0,
            "hidden/mse/L01": 3.0,
            "hidden/mse/L12": 1.0,
            "loss/hidden": 2.0,
            "loss": 0.5 * 1 + 0.5 * (2 + 2 * 2),
        }
    )
