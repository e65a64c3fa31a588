"""Keeps a NaN or an infinity out of the weights without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from distilllens import distributed


class NumericsGuard:
    """Watches values of each step; from the first non-finite one on, no update is made.

    The decision is taken on the device: the fused AdamW of PyTorch skips its update where
    ``optimizer.found_inf`` is 1 (that is how `torch.amp.GradScaler` does it). The host learns of it
    whenever it asks, and may ask seldom: weights and moments stay as they were.

    Args:
        optimizer: With ``fused=True``.
        device: Of the values.
        flag_device: Of the optimizer's states, if they are kept elsewhere.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        device: torch.device,
        flag_device: torch.device | None = None,
    ) -> None:
        assert optimizer.defaults["fused"], "found_inf is an attribute of the fused optimizer"
        self.optimizer, self.flag_device = optimizer, flag_device or device
        self.first_bad = torch.full((), torch.inf, device=device)

    def watch(self, values: Tensor, step: int) -> None:
        """Takes in values that the update of ``step`` comes from; all processes call it."""
        is_bad = (~torch.isfinite(values)).any()
        bad_step = torch.where(is_bad, float(step), torch.inf)
        self.first_bad = torch.minimum(self.first_bad, distributed.min_over_ranks(bad_step))
        found_inf = torch.isfinite(self.first_bad).float()
        # PyTorch itself would copy it to a CPU without waiting, and read what is there already.
        self.optimizer.found_inf = found_inf.to(self.flag_device)  # type: ignore[attr-defined]

    def bad_step(self) -> int | None:
        """Returns the first step whose update was refused, or None; waits for the device."""
        first = self.first_bad.item()
        return None if first == torch.inf else int(first)
