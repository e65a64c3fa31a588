"""The published loss, in our own words: what the other variants are measured against.

As in the paper's code (arXiv 2602.13567), every position of the padded sequences, prompt and
padding included, goes through both heads and through float32 softmaxes over the whole vocabulary;
a mask then keeps the response tokens' values. Autograd keeps all of it for the backward.

Two of that code's properties are left out, as they do not change the cost: that it skips the
model's final norm, and that it lays the mask of a batch out in another order than the logits.

Shapes: ``P`` positions (batch × padded length), ``V`` vocabulary, ``...`` any leading dimensions,
such as the K layer pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-8
"""Added to the mixture before its logarithm: the value falls short by up to V · 1e-8 nats."""


def published_divergence(
    kind: str,
    *,
    teacher_logits: Tensor,
    student_logits: Tensor,
    mask: Tensor,
    beta: float = 0.5,
) -> Tensor:
    """Returns the mean divergence of the masked positions, as the published code forms it.

    Args:
        kind: A key of `PUBLISHED_KINDS`.
        teacher_logits: ``[..., P, V]``, any floating dtype; constant.
        student_logits: ``[..., P, V]``, any floating dtype; differentiable.
        mask: ``[P]``, bool: True on response tokens; the same for all leading dimensions.
        beta: ``jsd``: weight of the teacher in the mixture, in (0, 1).

    Returns:
        A scalar in nats, float32 (float64 for float64 logits); NaN if no position is masked in.

    Raises:
        KeyError: The published code has no such divergence.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    p = torch.softmax(teacher_logits.to(dtype), dim=-1)
    log_p = torch.log_softmax(teacher_logits.to(dtype), dim=-1)
    q = torch.softmax(student_logits.to(dtype), dim=-1)
    log_q = torch.log_softmax(student_logits.to(dtype), dim=-1)
    value = PUBLISHED_KINDS[kind](p, log_p, q, log_q, beta)
    kept = mask.to(dtype).expand_as(value)
    return (value * kept).sum() / kept.sum()


def _jensen_shannon(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = torch.log(beta * p + (1 - beta) * q + EPSILON)
    teacher_part = (p * (log_p - log_m)).sum(-1)
    student_part = (q * (log_q - log_m)).sum(-1)
    return beta * teacher_part + (1 - beta) * student_part


PUBLISHED_KINDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]] = {
    "jsd": _jensen_shannon,
    "fkl": lambda p, log_p, q, log_q, beta: (p * (log_p - log_q)).sum(-1),
    "rkl": lambda p, log_p, q, log_q, beta: (q * (log_q - log_p)).sum(-1),
    "fkl+rkl": lambda p, log_p, q, log_q, beta: ((p - q) * (log_p - log_q)).sum(-1),
}
"""Divergences by name; the lens uses ``jsd``, the final layer ``rkl``."""
