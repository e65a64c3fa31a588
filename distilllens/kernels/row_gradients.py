"""Closed forms: the value and the gradient of each divergence and of the cross entropy, per row.

The gradient is taken with respect to the student's logits. With g = ∂D/∂q it is, for every kind,
q ⊙ (g − Σ q g), so terms of g that are constant over the vocabulary drop out. Each rule works on
one block of rows: float32 probabilities p, q and their logarithms, with `LOG_FLOOR` for −inf.

Shapes: n rows of a block, V vocabulary, k chosen tokens, C = k + 1 outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distilllens.divergence import (
    INFINITE,
    LOG_FLOOR,
    MIXTURE_FLOOR,
    DivergenceOptions,
    head_gap_share,
    likeliest_tokens,
)


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Room for a block of rows. A fresh tensor for each step would be paid in page faults."""

    p: Tensor
    q: Tensor
    more: Tensor

    @classmethod
    def like(cls, logits_nV: Tensor) -> Scratch:
        """Allocates for blocks of this shape, or of fewer rows."""
        p, q, more = (torch.empty_like(logits_nV) for _ in range(3))
        return cls(p=p, q=q, more=more)

    def cut(self, rows: int) -> Scratch:
        """Returns the first rows."""
        return Scratch(p=self.p[:rows], q=self.q[:rows], more=self.more[:rows])


def softmax_(logits_nV: Tensor, probs_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities, in place of the logits, and probabilities, in ``probs_nV``.

    `LOG_FLOOR` stands for −inf. The maximum goes first: GPT-2's logits lie around −100, where
    float32 rounds log Σ exp to 8e-6.
    """
    logits_nV -= logits_nV.amax(-1, keepdim=True)
    sum_n1 = torch.exp(logits_nV, out=probs_nV).sum(-1, keepdim=True)
    logits_nV -= sum_n1.log()
    return logits_nV.clamp_(min=LOG_FLOOR), probs_nV.div_(sum_n1)


def divergence_and_gradient_(
    kind: str,
    log_p: Tensor,
    p: Tensor,
    log_q: Tensor,
    q: Tensor,
    options: DivergenceOptions,
    scratch: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns ``value_n`` and ``gradient_nV``; may overwrite the teacher's side and the scratch."""
    value_n, gradient_nV = ROW_RULES[kind](log_p, p, log_q, q, options, scratch)
    return value_n.masked_fill_(value_n > INFINITE, torch.inf), gradient_nV


def top_k_divergence_and_gradient_(
    kind: str,
    teacher_nV: Tensor,
    student_nV: Tensor,
    top_k: int,
    options: DivergenceOptions,
    scratch_nV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compares the teacher's k likeliest tokens and one bucket for all the rest.

    The rules are the same, on k + 1 outcomes. With G their gradient, a chosen token has its own G,
    and token j of the rest has q_j / q_bucket · G_bucket: what it adds to the bucket's logit.

    Args:
        kind: A key of `ROW_RULES`.
        teacher_nV: Logits before the division by T; are overwritten.
        student_nV: Likewise; stay as they are.
        top_k: k, below the number of tokens.
        options: Of the divergence; T is taken from here.
        scratch_nV: Gets the gradient.

    Returns:
        ``value_n``, and ``gradient_nV`` with respect to the student's logits divided by T.
    """
    index_nk = likeliest_tokens(teacher_nV, top_k)
    teacher_nC, _ = _merge_rest_(teacher_nV.div_(options.temperature), index_nk)
    rest_nV = torch.div(student_nV, options.temperature, out=scratch_nV)
    student_nC, sum_n1 = _merge_rest_(rest_nV, index_nk)
    log_p, p = softmax_(teacher_nC, torch.empty_like(teacher_nC))
    log_q, q = softmax_(student_nC, torch.empty_like(student_nC))
    value_n, gradient_nC = divergence_and_gradient_(
        kind, log_p, p, log_q, q, options, torch.empty_like(q)
    )
    rest_nV *= gradient_nC[:, -1:] / sum_n1.clamp(min=1)  # 0 for an empty bucket, else ≥ 1
    return value_n, rest_nV.scatter_(1, index_nk, gradient_nC[:, :-1])


def _merge_rest_(logits_nV: Tensor, index_nk: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logits of the chosen tokens and, last, of the bucket; and a sum, ``[n, 1]``.

    The logits become exponentials: 0 for the chosen tokens; the others' sum is the one returned.
    """
    logits_nV -= logits_nV.amax(-1, keepdim=True)  # as in softmax_
    chosen_nk = logits_nV.gather(1, index_nk)
    logits_nV.scatter_(1, index_nk, -torch.inf)
    top_n1 = logits_nV.amax(-1, keepdim=True).clamp_(min=LOG_FLOOR)  # finite for an empty bucket
    sum_n1 = logits_nV.sub_(top_n1).exp_().sum(-1, keepdim=True)
    return torch.cat([chosen_nk, top_n1 + sum_n1.log()], dim=1), sum_n1


def cross_entropy(log_q: Tensor, targets_n: Tensor) -> Tensor:
    """Returns −log q[target]."""
    return -log_q.gather(1, targets_n.unsqueeze(1)).squeeze(1)


def add_cross_entropy_gradient_(
    gradient_nV: Tensor, q: Tensor, targets_n: Tensor, weight: float
) -> Tensor:
    """Adds weight · (q − onehot(target)) to a gradient."""
    column_n1 = targets_n.unsqueeze(1)
    gradient_nV.add_(q, alpha=weight)
    return gradient_nV.scatter_add_(1, column_n1, gradient_nV.new_full(column_n1.shape, -weight))


def _dot(a: Tensor, b: Tensor, scratch: Tensor) -> Tensor:
    """Σ a b by row; the scratch may be one of them."""
    return torch.mul(a, b, out=scratch).sum(-1)


def _project_(g: Tensor, q: Tensor, scratch: Tensor) -> Tensor:
    """q ⊙ (g − Σ q g), in place of g."""
    return g.sub_(_dot(q, g, scratch).unsqueeze(1)).mul_(q)


def _forward_kl(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, _: DivergenceOptions, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    value_n = _dot(p, log_p.sub_(log_q), scratch)
    return value_n, torch.sub(q, p, out=p)


def _reverse_kl(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, _: DivergenceOptions, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    ratio = torch.sub(log_q, log_p, out=log_p)
    value_n = _dot(q, ratio, scratch)
    return value_n, ratio.sub_(value_n.unsqueeze(1)).mul_(q)


def _mixed_kl(
    log_p: Tensor,
    p: Tensor,
    log_q: Tensor,
    q: Tensor,
    forward_weight: Tensor | float,
    reverse_weight: Tensor | float,
    scratch: Tensor,
) -> tuple[Tensor, Tensor]:
    """a KL(p‖q) + b KL(q‖p); the weights are numbers or one column per row."""
    ratio = torch.sub(log_q, log_p, out=log_p)
    forward_n1 = -_dot(p, ratio, scratch).unsqueeze(1)
    reverse_n1 = _dot(q, ratio, scratch).unsqueeze(1)
    value_n1 = forward_weight * forward_n1 + reverse_weight * reverse_n1
    gradient = ratio.sub_(reverse_n1).mul_(reverse_weight).add_(forward_weight).mul_(q)
    return value_n1.squeeze(1), gradient.sub_(p.mul_(forward_weight))


def _jeffreys(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, o: DivergenceOptions, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    return _mixed_kl(log_p, p, log_q, q, o.fkl_coeff, o.rkl_coeff, scratch)


def _adaptive_kl(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, o: DivergenceOptions, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    gap = torch.sub(q, p, out=scratch).abs_()
    head_share_n1 = head_gap_share(p, gap, mu=o.mu).unsqueeze(1)
    return _mixed_kl(log_p, p, log_q, q, head_share_n1, 1 - head_share_n1, scratch)


def _jensen_shannon(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, o: DivergenceOptions, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    log_m = torch.lerp(q, p, o.beta, out=scratch).clamp_(min=MIXTURE_FLOOR).log_()
    teacher_n = log_p.sub_(log_m).mul_(p).sum(-1)
    ratio = torch.sub(log_q, log_m, out=log_m)
    student_n = _dot(q, ratio, log_p)
    value_n = o.beta * teacher_n + (1 - o.beta) * student_n
    return value_n, ratio.sub_(student_n.unsqueeze(1)).mul_(q).mul_(1 - o.beta)


def _skewed_forward(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, o: DivergenceOptions, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    mixture = torch.lerp(q, p, o.alpha, out=scratch).clamp_(min=MIXTURE_FLOOR)
    share = torch.div(p, mixture)
    value_n = log_p.sub_(mixture.log_()).mul_(p).sum(-1)
    return value_n, _project_(share.mul_(o.alpha - 1), q, scratch)


def _skewed_reverse(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, o: DivergenceOptions, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    mixture = torch.lerp(p, q, o.alpha, out=p).clamp_(min=MIXTURE_FLOOR)
    share = torch.div(q, mixture, out=log_p)
    ratio = torch.sub(log_q, mixture.log_(), out=mixture)
    value_n = _dot(q, ratio, scratch)
    return value_n, _project_(ratio.sub_(share, alpha=o.alpha), q, scratch)


def _total_variation(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, _: DivergenceOptions, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    gap = torch.sub(q, p, out=p)
    value_n = 0.5 * torch.abs(gap, out=scratch).sum(-1)
    return value_n, _project_(gap.sign_().mul_(0.5), q, scratch)


RowRule = Callable[
    [Tensor, Tensor, Tensor, Tensor, DivergenceOptions, Tensor], tuple[Tensor, Tensor]
]
ROW_RULES: dict[str, RowRule] = {
    "fkl": _forward_kl,
    "rkl": _reverse_kl,
    "fkl+rkl": _jeffreys,
    "jsd": _jensen_shannon,
    "akl": _adaptive_kl,
    "skew_fkl": _skewed_forward,
    "skew_rkl": _skewed_reverse,
    "tvd": _total_variation,
}
