"""Keeps a NaN or an infinity out of the weights without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distilllens.data.collate import Batch
from distilllens.runtime import distributed


class WatchedStep(NamedTuple):
    """What a process knows of one of its steps."""

    step: int
    sums_K2: Tensor
    """Its own sums of the loss's components."""
    num_tokens: int
    """Response tokens of the global batch."""
    records: Sequence[int]
    """Its own records' places in the training table."""
    batches: Sequence[Batch]


class NumericsGuard:
    """Watches losses and gradients; from the first non-finite one on, no update is made.

    The decision is taken on the device: the fused AdamW of PyTorch skips its update where
    ``optimizer.found_inf`` is 1 (that is how `torch.amp.GradScaler` does it). The host learns of it
    whenever it asks, and may ask seldom: weights and moments stay as they were.

    A gradient is looked at where autograd hands it over, before DeepSpeed sums, divides or frees
    it: one sum of each, in which no NaN or infinity can hide. That is the same for all ZeRO stages.

    Args:
        optimizer: With ``fused=True``.
        parameters: Names and parameters; of those that are trained, gradients are watched.
        device: Of the values.
        flag_device: Of the optimizer's states, if they are kept elsewhere.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        parameters: Iterable[tuple[str, nn.Parameter]],
        device: torch.device,
        flag_device: torch.device | None = None,
    ) -> None:
        assert optimizer.defaults["fused"], "found_inf is an attribute of the fused optimizer"
        self.optimizer, self.flag_device = optimizer, flag_device or device
        self.first_bad = torch.full((), torch.inf, device=device)
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.gradient_sums_P = torch.zeros(len(trained), device=device)
        for place, (_, parameter) in enumerate(trained):
            parameter.register_hook(partial(self._see_gradient, place))
        self.seen: list[WatchedStep] = []
        """Since the host asked last."""

    def _see_gradient(self, place: int, gradient: Tensor) -> None:
        self.gradient_sums_P[place] += gradient.sum(dtype=torch.float32)

    def watch(self, seen: WatchedStep) -> None:
        """Takes in a step's losses, between its last backward and its update; all processes do."""
        values = torch.cat([seen.sums_K2.flatten(), self.gradient_sums_P])
        is_bad = (~torch.isfinite(values)).any()
        bad_step = torch.where(is_bad, float(seen.step), torch.inf)
        self.first_bad = torch.minimum(self.first_bad, distributed.min_over_ranks(bad_step))
        found_inf = torch.isfinite(self.first_bad).float()
        # PyTorch itself would copy it to a CPU without waiting, and read what is there already.
        self.optimizer.found_inf = found_inf.to(self.flag_device)  # type: ignore[attr-defined]
        self.seen.append(seen)

    def bad_step(self) -> WatchedStep | None:
        """Returns the first step whose update was refused, or None; waits for the device."""
        first = self.first_bad.item()
        if first == torch.inf:
            self.seen.clear()
            self.gradient_sums_P.zero_()
            return None
        return next(seen for seen in self.seen if seen.step == first)

    def bad_gradients(self) -> list[str]:
        """Returns the parameters whose gradients in this process were not finite since then."""
        is_bad_P = (~torch.isfinite(self.gradient_sums_P)).tolist()
        return [name for name, is_bad in zip(self.names, is_bad_P, strict=True) if is_bad]
