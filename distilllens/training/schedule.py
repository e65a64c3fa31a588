"""The courses of the learning rate and of the lens's weight, as pure functions of the step."""

from __future__ import annotations

import math

from distilllens.config import LensConfig, OptimConfig


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Returns the number of warmup steps: ``optim.warmup`` as steps (≥ 1) or as a share (< 1)."""
    if optim.warmup >= 1:
        return min(int(optim.warmup), total_steps)
    return round(optim.warmup * total_steps)


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Returns the learning rate of optimizer step ``step``, counted from 0.

    Linear warmup to ``lr`` over the first W steps (step W − 1 has the full rate), then from ``lr``
    towards ``lr_min``, which the step after the last would reach.
    """
    warmup = warmup_steps(optim, total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    if optim.schedule == "linear":
        remaining = 1 - progress
    else:
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr_min + (optim.lr - optim.lr_min) * remaining


def lens_share(lens: LensConfig, step: int, total_steps: int) -> float:
    """Returns λ of optimizer step ``step``, counted from 0, as a share of ``lens.coeff``.

    With R = ``lens.schedule_share`` of all steps, rounded, at least 1: ``ramp`` is
    min(1, step / R), so 0 at the first step and 1 from step R on. ``decay`` is the same read
    backwards, min(1, (total_steps − 1 − step) / R): 1 until R steps before the last, which has 0.
    """
    if lens.schedule == "constant":
        return 1.0
    steps = max(1, round(lens.schedule_share * total_steps))
    passed = step if lens.schedule == "ramp" else total_steps - 1 - step
    return min(1.0, passed / steps)
