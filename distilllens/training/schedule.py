"""The courses of the learning rate and of the lens's weights, as pure functions of the step."""

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


def lens_shares(lens: LensConfig, num_pairs: int, step: int, total_steps: int) -> list[float]:
    """Returns each pair's λ at optimizer step ``step``, counted from 0, as a share of its full one.

    With R = ``lens.schedule_share`` of all steps, rounded, at least 1: ``ramp`` is
    min(1, step / R) for all pairs, so 0 at the first step and 1 from step R on. ``decay`` is the
    same read backwards, min(1, (total_steps − 1 − step) / R): 1 until R steps before the last,
    which has 0.

    ``deepest_first`` and ``shallowest_first`` let the K pairs join one after another: the one
    whose turn is j (from 0) rises in a line from 0 at step j · R / K to 1 at step (j + 1) · R / K.
    The mean of the shares is that of ``ramp``.

    Args:
        lens: The schedule.
        num_pairs: K.
        step: From 0.
        total_steps: Of the run.

    Returns:
        K numbers in [0, 1], in the order of the pairs: shallow to deep.
    """
    if lens.schedule == "constant":
        return [1.0] * num_pairs
    steps = max(1, round(lens.schedule_share * total_steps))
    passed = total_steps - 1 - step if lens.schedule == "decay" else step
    if lens.schedule in ("ramp", "decay"):
        return [min(1.0, passed / steps)] * num_pairs
    joined = num_pairs * passed / steps  # pairs so far; a part of one is under way
    shares = [min(1.0, max(0.0, joined - turn)) for turn in range(num_pairs)]
    return shares if lens.schedule == "shallowest_first" else shares[::-1]
