"""Gradient clipping without ZeRO, where DeepSpeed's own would keep the norm to itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients, in place, to a joint L2 norm of at most ``max_norm``.

    Nothing here waits for the device.

    Args:
        parameters: Those without a gradient are passed over.
        max_norm: 0: all gradients stay as they are.

    Returns:
        The norm before that, a scalar on the gradients' device.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
