"""A non-finite loss never reaches the weights, however late the host looks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distilllens.training.numerics_guard import NumericsGuard, WatchedStep

CPU = torch.device("cpu")


def seen(step: int, sums: list[float]) -> WatchedStep:
    return WatchedStep(
        step=step, sums_K2=torch.tensor([sums]), num_tokens=4, records=[7], batches=[]
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_update_from_the_bad_step_on(bad: float) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = NumericsGuard(optimizer, [("weight", weight)], CPU)
    for step, value in enumerate([1.0, 2.0, bad, 3.0], start=1):
        before = weight.detach().clone()
        moments = [t.clone() for t in optimizer.state[weight].values()]
        weight.grad = torch.full((3,), value)
        guard.watch(seen(step, [0.5, value]))
        optimizer.step()
        assert torch.equal(weight, before) == (step >= 3), step
        if step >= 3:  # the moments are kept too
            assert all(
                torch.equal(a, b)
                for a, b in zip(moments, optimizer.state[weight].values(), strict=True)
            )
    found = guard.bad_step()
    assert found is not None and found.step == 3 and guard.bad_gradients() == []


def test_finite_values_pass_unseen() -> None:
    weight = nn.Parameter(torch.ones(3))
    guarded = torch.optim.AdamW([weight], lr=0.1, fused=True)
    twin = nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([twin], lr=0.1, fused=True)
    guard = NumericsGuard(guarded, [("weight", weight)], CPU)
    for step in range(1, 5):
        weight.grad = torch.arange(3.0) * step
        twin.grad = weight.grad.clone()
        guard.watch(seen(step, [1e30, float(step)]))
        guarded.step()
        plain.step()
    assert torch.equal(weight, twin)
    assert guard.bad_step() is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_seen_where_the_losses_are(bad: float) -> None:
    """√x has a finite value at 0 and an infinite slope."""
    good, weight = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = torch.optim.AdamW([good, weight], lr=0.1, fused=True)
    named = [("good", good), ("frozen", frozen), ("weight", weight)]
    guard = NumericsGuard(optimizer, named, CPU)
    for step, offset in enumerate([1.0, 0.0, 1.0], start=1):
        before = weight.detach().clone()
        shifted = weight - weight.detach() + offset
        slope = 0.0 if bad != bad and offset == 0 else 1.0  # 0 · ∞ is NaN
        loss = good.sum() + frozen.sum() + (slope * shifted.sqrt()).sum()
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        guard.watch(seen(step, [loss.item(), 0.0]))
        optimizer.step()
        assert torch.equal(weight, before) == (step >= 2), step
        if step == 1:
            assert guard.bad_step() is None
    found = guard.bad_step()
    assert found is not None and found.step == 2
    assert guard.bad_gradients() == ["weight"]


def test_the_flag_goes_where_the_states_are() -> None:
    """With states on the CPU the optimizer steps there, while losses come from the device."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))], fused=True)
    elsewhere = torch.device("meta")
    NumericsGuard(optimizer, [], CPU, elsewhere).watch(seen(1, [1.0]))
    assert optimizer.found_inf.device == elsewhere  # type: ignore[attr-defined]
