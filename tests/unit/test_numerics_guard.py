"""A non-finite loss never reaches the weights, however late the host looks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distilllens.numerics_guard import NumericsGuard

CPU = torch.device("cpu")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_update_from_the_bad_step_on(bad: float) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = NumericsGuard(optimizer, CPU)
    for step, value in enumerate([1.0, 2.0, bad, 3.0], start=1):
        before = weight.detach().clone()
        moments = [t.clone() for t in optimizer.state[weight].values()]
        weight.grad = torch.full((3,), value)
        guard.watch(torch.tensor([[0.5, value]]), step)
        optimizer.step()
        assert torch.equal(weight, before) == (step >= 3), step
        if step >= 3:  # the moments are kept too
            assert all(
                torch.equal(a, b)
                for a, b in zip(moments, optimizer.state[weight].values(), strict=True)
            )
    assert guard.bad_step() == 3


def test_finite_values_pass_unseen() -> None:
    weight = nn.Parameter(torch.ones(3))
    guarded = torch.optim.AdamW([weight], lr=0.1, fused=True)
    twin = nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([twin], lr=0.1, fused=True)
    guard = NumericsGuard(guarded, CPU)
    for step in range(1, 5):
        weight.grad = torch.arange(3.0) * step
        twin.grad = weight.grad.clone()
        guard.watch(torch.tensor([1e30, float(step)]), step)
        guarded.step()
        plain.step()
    assert torch.equal(weight, twin)
    assert guard.bad_step() is None


def test_the_flag_goes_where_the_states_are() -> None:
    """With states on the CPU the optimizer steps there, while losses come from the device."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))], fused=True)
    elsewhere = torch.device("meta")
    NumericsGuard(optimizer, CPU, elsewhere).watch(torch.tensor([1.0]), 1)
    assert optimizer.found_inf.device == elsewhere  # type: ignore[attr-defined]
