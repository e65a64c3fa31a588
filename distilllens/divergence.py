"""The reference mathematics: divergences between teacher and student distributions, row by row.

Plain PyTorch that reads like the formulas; autograd gives the gradients. `distilllens.fused`
computes the same numbers without ever holding the logits of a whole batch; training uses that one,
tests hold it against this one, and this one against float64 closed forms.

Shapes: N rows (response tokens), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOG_FLOOR = -1e30
"""Stands for log 0: finite, so that 0 · log 0 is 0 and not NaN."""
MIXTURE_FLOOR = 1e-37
"""Smallest mixture probability; float32 keeps it normal, its log is −85."""
INFINITE = 1e20
"""A row's value above this came from LOG_FLOOR: mass where the other side has none."""


@dataclass(frozen=True, kw_only=True)
class DivergenceOptions:
    """What the kinds are tuned by; see `divergence`."""

    beta: float = 0.5
    mu: float = 0.5
    alpha: float = 0.1
    fkl_coeff: float = 1.0
    rkl_coeff: float = 1.0
    temperature: float = 1.0


def divergence(
    kind: str,
    *,
    teacher_logits_NV: Float[Tensor, "N V"],
    student_logits_NV: Float[Tensor, "N V"],
    beta: float = 0.5,
    mu: float = 0.5,
    alpha: float = 0.1,
    fkl_coeff: float = 1.0,
    rkl_coeff: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """Computes one divergence per row between softmax(teacher / T) and softmax(student / T).

    Args:
        kind: A key of `DIVERGENCES`.
        teacher_logits_NV: Raw logits, any floating dtype; −inf means probability 0.
        student_logits_NV: Raw logits, any floating dtype; −inf means probability 0.
        beta: ``jsd``: weight of the *teacher* in the mixture, in (0, 1).
        mu: ``akl``: cumulative teacher probability of the head, in (0, 1).
        alpha: ``skew_*``: share of the first argument of the KL in its mixture, in (0, 1).
        fkl_coeff: ``fkl+rkl``: weight of the forward KL.
        rkl_coeff: ``fkl+rkl``: weight of the reverse KL.
        temperature: T > 0, divides both logits. The value is not multiplied by T².

    Returns:
        Nats, ≥ 0 up to rounding, not reduced. float32, or float64 if an input is float64.
        Infinite where one side has mass and the other none, for the kinds that are unbounded.

    Raises:
        ValueError: Unknown kind, or shapes that differ.
    """
    check_kind(kind)
    if teacher_logits_NV.shape != student_logits_NV.shape:
        raise ValueError(
            f"teacher logits {tuple(teacher_logits_NV.shape)} and "
            f"student logits {tuple(student_logits_NV.shape)} differ in shape"
        )
    log_p = log_probs(teacher_logits_NV, temperature)
    log_q = log_probs(student_logits_NV, temperature)
    options = DivergenceOptions(
        beta=beta, mu=mu, alpha=alpha, fkl_coeff=fkl_coeff, rkl_coeff=rkl_coeff
    )
    value_N = DIVERGENCES[kind](log_p, log_q, options)
    return torch.where(value_N > INFINITE, torch.inf, value_N)


def check_kind(kind: str) -> None:
    """Raises ValueError for a kind that `DIVERGENCES` does not name."""
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kind!r}; known: {', '.join(DIVERGENCES)}")


def log_probs(logits_NV: Float[Tensor, "N V"], temperature: float = 1.0) -> Float[Tensor, "N V"]:
    """Returns log softmax(logits / T), at least float32, with `LOG_FLOOR` in place of −inf."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return torch.log_softmax(logits_NV.to(dtype) / temperature, dim=-1).clamp(min=LOG_FLOOR)


def forward_kl(log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(p‖q) = Σ p (log p − log q).

    Teacher first is the forward KL (Hinton et al. 2015, up to the teacher's entropy), student first
    the reverse KL (MiniLLM, Gu et al. 2024).
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(
    log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"], *, beta: float = 0.5
) -> Float[Tensor, " N"]:
    """β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q (GKD, Agarwal et al. 2024).

    Not rescaled by 1 / (β(1−β)): the value goes to 0 as β goes to 0 or 1. At most ln 2 for β = 0.5.
    """
    mixture = beta * log_p.exp() + (1 - beta) * log_q.exp()
    log_m = mixture.clamp(min=MIXTURE_FLOOR).log()
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def adaptive_kl(
    log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"], *, mu: float = 0.5
) -> Float[Tensor, " N"]:
    """(g_h · KL(p‖q) + g_t · KL(q‖p)) / (g_h + g_t) (AKL, Wu et al. 2024).

    g_h and g_t are Σ|p − q| over the teacher's head and tail; the head holds its likeliest tokens
    while their cumulative probability is ≤ μ, the first always. g carries no gradient.
    """
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        head_share_N = head_gap_share(p, (p - q).abs(), mu=mu)
    return head_share_N * forward_kl(log_p, log_q) + (1 - head_share_N) * forward_kl(log_q, log_p)


def head_gap_share(
    p: Float[Tensor, "N V"], gap: Float[Tensor, "N V"], *, mu: float
) -> Float[Tensor, " N"]:
    """Returns g_h / (g_h + g_t), the share of the gap on the teacher's head, in [0, 1]."""
    ordered, index = p.sort(dim=-1, descending=True, stable=True)
    in_head = ordered.cumsum(-1) <= mu
    in_head[..., :1] = True
    gap_head = gap.gather(-1, index).masked_fill(~in_head, 0).sum(-1)
    return gap_head / gap.sum(-1).clamp(min=MIXTURE_FLOOR)


def skewed_kl(
    log_a: Float[Tensor, "N V"], log_b: Float[Tensor, "N V"], *, alpha: float
) -> Float[Tensor, " N"]:
    """KL(a‖αa + (1−α)b) (DistiLLM, Ko et al. 2024); at most −log α."""
    mixture = alpha * log_a.exp() + (1 - alpha) * log_b.exp()
    return forward_kl(log_a, mixture.clamp(min=MIXTURE_FLOOR).log())


def total_variation(
    log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """½ Σ|p − q|, in [0, 1] (f-distill, Wen et al. 2023)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, DivergenceOptions], Tensor]] = {
    "fkl": lambda log_p, log_q, o: forward_kl(log_p, log_q),
    "rkl": lambda log_p, log_q, o: forward_kl(log_q, log_p),
    "fkl+rkl": lambda log_p, log_q, o: (
        o.fkl_coeff * forward_kl(log_p, log_q) + o.rkl_coeff * forward_kl(log_q, log_p)
    ),
    "jsd": lambda log_p, log_q, o: jensen_shannon(log_p, log_q, beta=o.beta),
    "akl": lambda log_p, log_q, o: adaptive_kl(log_p, log_q, mu=o.mu),
    "skew_fkl": lambda log_p, log_q, o: skewed_kl(log_p, log_q, alpha=o.alpha),
    "skew_rkl": lambda log_p, log_q, o: skewed_kl(log_q, log_p, alpha=o.alpha),
    "tvd": lambda log_p, log_q, o: total_variation(log_p, log_q),
}
"""Every kind by the name that a configuration uses; teacher first, student second."""
