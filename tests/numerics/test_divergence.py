"""The reference mathematics against torch.distributions, closed forms and hand-computed cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from distilllens.divergence import DIVERGENCES, divergence

KINDS = sorted(DIVERGENCES)
LN2 = math.log(2)


def rows(*probabilities: list[float]) -> torch.Tensor:
    """Returns logits whose softmax is exactly these probabilities; log 0 is −inf."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_logits(seed: int, size: tuple[int, int] = (7, 33)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(size, generator=generator, dtype=torch.float64)
    return teacher, teacher + torch.randn(size, generator=generator, dtype=torch.float64)


def value(kind: str, p: torch.Tensor, q: torch.Tensor, **options: Any) -> torch.Tensor:
    return divergence(kind, teacher_logits_NV=p, student_logits_NV=q, **options)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return kl_divergence(Categorical(probs=p), Categorical(probs=q))


def test_kl_kinds_equal_torch_distributions() -> None:
    teacher, student = random_logits(0)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(value("fkl", teacher, student), kl(p, q))
    torch.testing.assert_close(value("rkl", teacher, student), kl(q, p))
    torch.testing.assert_close(
        value("fkl+rkl", teacher, student, fkl_coeff=0.3, rkl_coeff=2.0),
        0.3 * kl(p, q) + 2 * kl(q, p),
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_weights_the_teacher_by_beta(beta: float) -> None:
    teacher, student = random_logits(1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = beta * p + (1 - beta) * q
    torch.testing.assert_close(
        value("jsd", teacher, student, beta=beta), beta * kl(p, m) + (1 - beta) * kl(q, m)
    )


@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_skewed_kinds_mix_in_the_first_argument(alpha: float) -> None:
    teacher, student = random_logits(2)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(
        value("skew_fkl", teacher, student, alpha=alpha), kl(p, alpha * p + (1 - alpha) * q)
    )
    torch.testing.assert_close(
        value("skew_rkl", teacher, student, alpha=alpha), kl(q, (1 - alpha) * p + alpha * q)
    )


def test_hand_computed_two_tokens() -> None:
    teacher, student = rows([0.75, 0.25]), rows([0.5, 0.5])
    fkl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    rkl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    assert value("fkl", teacher, student).item() == pytest.approx(fkl, abs=1e-12)
    assert value("rkl", teacher, student).item() == pytest.approx(rkl, abs=1e-12)
    assert value("tvd", teacher, student).item() == pytest.approx(0.25, abs=1e-12)
    # Head (cumulative ≤ 0.5, the first always): token 0 alone; both gaps are 0.25, the ratio ½.
    assert value("akl", teacher, student).item() == pytest.approx((fkl + rkl) / 2, abs=1e-12)


def test_akl_head_by_hand() -> None:
    # Sorted teacher: 0.3, 0.2, 0.2, 0.2, 0.1; cumulative 0.3, 0.5, …: the head is two tokens.
    teacher, student = rows([0.2, 0.3, 0.1, 0.2, 0.2]), rows([0.1, 0.1, 0.5, 0.2, 0.1])
    p, q = teacher.exp(), student.exp()
    # Gaps 0.1 0.2 0.4 0 0.1; head: token 1 and the first of the equal ones, token 0.
    share = (0.2 + 0.1) / 0.8
    expected = share * kl(p, q) + (1 - share) * kl(q, p)
    torch.testing.assert_close(value("akl", teacher, student, mu=0.5001), expected)


def test_disjoint_distributions() -> None:
    teacher, student = rows([1.0, 0.0]), rows([0.0, 1.0])
    assert value("jsd", teacher, student).item() == pytest.approx(LN2, abs=1e-9)
    assert value("tvd", teacher, student).item() == pytest.approx(1.0)
    assert value("skew_fkl", teacher, student, alpha=0.1).item() == pytest.approx(-math.log(0.1))
    assert value("skew_rkl", teacher, student, alpha=0.1).item() == pytest.approx(-math.log(0.1))
    assert value("fkl", teacher, student).item() == math.inf
    assert value("rkl", teacher, student).item() == math.inf


def test_zero_mass_on_one_side_is_finite_where_it_should_be() -> None:
    masked_teacher, student = rows([0.5, 0.5, 0.0]), rows([0.25, 0.25, 0.5])
    assert value("fkl", masked_teacher, student).item() == pytest.approx(LN2)
    assert value("rkl", masked_teacher, student).item() == math.inf
    both = rows([0.5, 0.5, 0.0]), rows([0.25, 0.75, 0.0])
    for kind in KINDS:
        assert math.isfinite(value(kind, *both).item()), kind


@pytest.mark.parametrize("kind", KINDS)
def test_nan_logits_give_nan(kind: str) -> None:
    teacher, student = random_logits(3)
    student[2, 5] = math.nan
    result = value(kind, teacher, student)
    assert math.isnan(result[2].item())
    assert torch.isfinite(result[[0, 1, 3]]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_logits_give_zero(kind: str, dtype: torch.dtype) -> None:
    logits = (10 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(4))).to(dtype)
    result = value(kind, logits, logits)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(result, torch.zeros_like(result), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_divides_both_logits(kind: str) -> None:
    teacher, student = random_logits(5)
    torch.testing.assert_close(
        value(kind, teacher, student, temperature=2.5), value(kind, teacher / 2.5, student / 2.5)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_float32_against_float64_on_a_large_vocabulary(kind: str) -> None:
    teacher, student = random_logits(6, (3, 151_936))
    single = value(kind, teacher.float(), student.float())
    torch.testing.assert_close(single.double(), value(kind, teacher, student), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "akl"])
def test_gradcheck(kind: str) -> None:
    teacher, student = random_logits(7, (3, 9))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: value(kind, teacher, z), student)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 60), vocab=st.integers(2, 200))
def test_bounds_and_symmetry(seed: int, scale: float, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(5, vocab, generator=generator)
    student = scale * torch.randn(5, vocab, generator=generator)
    for kind in KINDS:
        assert (value(kind, teacher, student) >= -1e-6).all(), kind
    jsd = value("jsd", teacher, student)
    assert (jsd <= LN2 + 1e-6).all()
    torch.testing.assert_close(jsd, value("jsd", student, teacher), atol=1e-6, rtol=1e-5)
    assert (value("tvd", teacher, student) <= 1 + 1e-6).all()


def test_refusals(users_view: None) -> None:
    teacher, student = random_logits(8)
    with pytest.raises(ValueError, match="unknown divergence 'kl'; known: fkl, rkl"):
        value("kl", teacher, student)
    with pytest.raises(ValueError, match="differ in shape"):
        value("fkl", teacher[:2], student)


def test_zero_rows() -> None:
    empty = torch.zeros(0, 5)
    for kind in KINDS:
        assert value(kind, empty, empty).shape == (0,)
