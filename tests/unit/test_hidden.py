"""Distances between hidden states against loops in float64, and the projectors' beginning."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from distilllens.hidden import HiddenComparison, Projector

Loss = Literal["mse", "cosine"]
PAIRS, ROWS, WIDTH, TEACHER_WIDTH = 2, 7, 5, 3


def comparison(loss: Loss = "mse", *, seed: int = 3, width: int = WIDTH) -> HiddenComparison:
    return HiddenComparison(PAIRS, width, TEACHER_WIDTH, loss=loss, seed=seed)


def weights(module: HiddenComparison) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def rows(width: int, *, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    drawn = [2 * torch.randn(ROWS, width, generator=generator) for _ in range(PAIRS)]
    return [pair.requires_grad_(requires_grad) for pair in drawn]


def by_hand(loss: Loss, student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    """Number by number, as the formulas stand in the papers."""
    total = torch.zeros((), dtype=torch.float64)
    for row, goal in zip(student, teacher.double(), strict=True):
        mapped = [sum(w * x for w, x in zip(line, row, strict=True)) for line in weight]
        if loss == "mse":
            total = total + sum((m - g) ** 2 for m, g in zip(mapped, goal, strict=True)) / len(goal)
        else:
            dot = sum(m * g for m, g in zip(mapped, goal, strict=True))
            size = sum(m * m for m in mapped) * sum(g * g for g in goal)
            total = total + 1 - dot / torch.as_tensor(size).sqrt()
    return total


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_values_and_gradients(loss: Loss) -> None:
    module, teacher, student = comparison(loss), rows(TEACHER_WIDTH), rows(WIDTH)
    leaves = [pair.clone().requires_grad_() for pair in student]
    sums = module(leaves, teacher)
    assert sums.shape == (PAIRS,) and sums.dtype == torch.float32
    (sums * torch.tensor([2.0, -3.0])).sum().backward()
    for k, factor in enumerate((2.0, -3.0)):
        row_leaf = student[k].double().requires_grad_()
        weight_leaf = weights(module)[k].double().requires_grad_()
        expected = by_hand(loss, row_leaf, weight_leaf, teacher[k])
        (factor * expected).backward()
        torch.testing.assert_close(sums[k].double(), expected, rtol=1e-5, atol=1e-6)
        weight_gradient = list(module.parameters())[k].grad
        for actual, oracle in (
            (leaves[k].grad, row_leaf.grad),
            (weight_gradient, weight_leaf.grad),
        ):
            assert actual is not None
            torch.testing.assert_close(actual.double(), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_gradients_in_float64(loss: Loss) -> None:
    module = comparison(loss).double()
    student = [pair.double().requires_grad_() for pair in rows(WIDTH)]
    teacher = rows(TEACHER_WIDTH)
    first, second = module.parameters()

    def run(*_: Tensor) -> Tensor:
        out: Tensor = module(student, teacher)
        return out

    assert torch.autograd.gradcheck(run, (*student, first, second))


def test_known_values() -> None:
    module = HiddenComparison(1, 2, 2, loss="mse", seed=0)
    projector = module.projectors[0]
    assert isinstance(projector, Projector)
    projector.weight.data = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # (a, b) → (b, 2a)
    student, teacher = [torch.tensor([[1.0, 3.0], [0.0, 1.0]])], [torch.tensor([[0.0, 2.0]] * 2)]
    assert module(student, teacher).item() == (3**2 + 0) / 2 + (1 + 2**2) / 2
    module.loss = "cosine"
    assert module(student, teacher).item() == pytest.approx(2 - 2 / math.sqrt(13))


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_rows_of_inference_mode_are_constants(loss: Loss) -> None:
    """A teacher that runs hands over such rows, in which autograd may keep nothing."""
    module, student = comparison(loss), rows(WIDTH, requires_grad=True)
    with torch.inference_mode():
        teacher = [pair * 1 for pair in rows(TEACHER_WIDTH)]
    module(student, teacher).sum().backward()
    assert all(pair.grad is not None and pair.grad.abs().min() > 0 for pair in student)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_bfloat16_is_only_how_things_are_stored(loss: Loss) -> None:
    module = comparison(loss).bfloat16()
    student, teacher = ([p.bfloat16() for p in rows(w)] for w in (WIDTH, TEACHER_WIDTH))
    wide = comparison(loss)
    for parameter, stored in zip(wide.parameters(), module.parameters(), strict=True):
        parameter.data = stored.data.float()
    expected = wide([p.float() for p in student], [p.float() for p in teacher])
    assert torch.equal(module(student, teacher), expected)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_no_rows_and_rows_of_zeros(loss: Loss) -> None:
    module = comparison(loss)
    empty = module([p[:0] for p in rows(WIDTH)], [p[:0] for p in rows(TEACHER_WIDTH)])
    assert empty.tolist() == [0.0, 0.0]
    leaves = [torch.zeros(1, WIDTH, requires_grad=True) for _ in range(PAIRS)]
    sums = module(leaves, [torch.zeros(1, TEACHER_WIDTH)] * PAIRS)
    sums.sum().backward()
    assert sums.tolist() == ([0.0, 0.0] if loss == "mse" else [1.0, 1.0])
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_projectors_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(comparison())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, weights(comparison())))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], weights(comparison(seed=4))[0])


def test_projected_rows_keep_their_size() -> None:
    drawn = Projector(256, 512, torch.Generator().manual_seed(0))
    incoming = 3 * torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    assert drawn(incoming).std().item() == pytest.approx(3.0, rel=0.02)
