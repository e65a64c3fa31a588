"""The reference mathematics: divergences between teacher and student distributions, row by row.

Plain PyTorch that reads like the formulas; autograd gives the gradients. `distilllens.fused`
computes the same numbers without ever holding the logits of a whole batch; training uses that one,
tests hold it against this one, and this one against float64 closed forms.

Shapes: N rows (response tokens), V vocabulary, k chosen tokens, C = k + 1 outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from jaxtyping import Float, Int64
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
    top_k: int | None = None


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
    top_k: int | None = None,
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
        top_k: Compare the teacher's k likeliest tokens (see `likeliest_tokens`) and one bucket
            that holds all the rest; k ≥ 1. None, or k ≥ V: every token.

    Returns:
        Nats, ≥ 0 up to rounding, not reduced. float32, or float64 if an input is float64.
        Infinite where one side has mass and the other none, for the kinds that are unbounded.

    Raises:
        ValueError: Unknown kind, ``top_k`` that is no whole number ≥ 1, or shapes that differ.
    """
    check_kind(kind)
    check_top_k(top_k)
    if teacher_logits_NV.shape != student_logits_NV.shape:
        raise ValueError(
            f"teacher logits {tuple(teacher_logits_NV.shape)} and "
            f"student logits {tuple(student_logits_NV.shape)} differ in shape"
        )
    log_p = log_probs(teacher_logits_NV, temperature)
    log_q = log_probs(student_logits_NV, temperature)
    if merges_tokens(top_k, log_p.shape[-1]):
        index_Nk = likeliest_tokens(teacher_logits_NV, top_k)
        log_p, log_q = merge_rest(log_p, index_Nk), merge_rest(log_q, index_Nk)
    options = DivergenceOptions(
        beta=beta, mu=mu, alpha=alpha, fkl_coeff=fkl_coeff, rkl_coeff=rkl_coeff
    )
    value_N = DIVERGENCES[kind](log_p, log_q, options)
    return torch.where(value_N > INFINITE, torch.inf, value_N)


def check_kind(kind: str) -> None:
    """Raises ValueError for a kind that `DIVERGENCES` does not name."""
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kind!r}; known: {', '.join(DIVERGENCES)}")


def check_top_k(top_k: int | None) -> None:
    """Raises ValueError for a ``top_k`` that is no whole number ≥ 1; None is all right."""
    if top_k is None:
        return
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k={top_k!r} must be a whole number ≥ 1, or None for every token")


def merges_tokens(top_k: int | None, vocab_size: int) -> TypeGuard[int]:
    """Whether tokens are left for a bucket."""
    return top_k is not None and top_k < vocab_size


def likeliest_tokens(logits_NV: Float[Tensor, "N V"], top_k: int) -> Int64[Tensor, "N k"]:
    """Returns the ids of each row's k largest logits, ascending; of equal logits the smaller id.

    `torch.topk` chooses among equals as it likes, so it chooses twice: the k largest, then the
    smallest ids among those equal to the last of them. A stable sort would take 30 times as long.
    """
    values_Nk, index_Nk = logits_NV.topk(top_k)  # largest first
    last_N1 = values_Nk[:, -1:]
    vocab_size, device = logits_NV.shape[1], logits_NV.device
    # float32 is exact for ids below 2²⁴; smaller ids get larger numbers.
    places_V = torch.arange(vocab_size, 0, -1, dtype=torch.float32, device=device)
    equal_NV = torch.empty(logits_NV.shape, dtype=torch.float32, device=device)
    torch.eq(logits_NV, last_N1, out=equal_NV)
    equals_Nk = equal_NV.mul_(places_V).topk(top_k).indices  # smallest id first
    larger_Nk = values_Nk > last_N1
    rank_Nk = torch.arange(top_k, device=device) - larger_Nk.sum(-1, keepdim=True)
    chosen_Nk = torch.where(larger_Nk, index_Nk, equals_Nk.gather(1, rank_Nk.clamp(min=0)))
    return chosen_Nk.sort(-1).values


def merge_rest(
    log_probs_NV: Float[Tensor, "N V"], index_Nk: Int64[Tensor, "N k"]
) -> Float[Tensor, "N C"]:
    """Returns log-probabilities of the chosen tokens and, last, of all other tokens together.

    The latter by a log-sum-exp: log(1 − Σ of the chosen) would be lost in rounding.
    """
    rest_NV = log_probs_NV.scatter(-1, index_Nk, LOG_FLOOR)
    bucket_N1 = rest_NV.logsumexp(-1, keepdim=True)
    return torch.cat([log_probs_NV.gather(-1, index_Nk), bucket_N1], dim=-1)


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
