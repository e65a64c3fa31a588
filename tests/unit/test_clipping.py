"""Gradients of a known norm: 3, 4 and 12 make 13."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distilllens.training.clipping import clip_gradients_


def parameters_with_gradients(*gradients: float) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor([gradient])
    return parameters


@pytest.mark.parametrize(
    ("max_norm", "factor"), [(0.0, 1.0), (1.3, 0.1), (6.5, 0.5), (13.5, 1.0), (1e9, 1.0)]
)
def test_norm_and_scale(max_norm: float, factor: float) -> None:
    parameters = parameters_with_gradients(3.0, -4.0, 12.0)
    parameters.insert(1, nn.Parameter(torch.ones(2)))  # frozen, or not reached
    assert clip_gradients_(parameters, max_norm).item() == 13.0
    assert parameters[1].grad is None
    left = [p.grad.item() for p in parameters if p.grad is not None]
    assert left == pytest.approx([factor * 3, factor * -4, factor * 12], rel=1e-6)


def test_a_broken_gradient_is_told() -> None:
    assert math.isnan(clip_gradients_(parameters_with_gradients(1.0, math.nan), 1.0).item())
