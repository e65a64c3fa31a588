"""Closed forms: the value and the gradient of each divergence and of the cross entropy, per row.

The gradient is taken with respect to the student's logits. With g = ∂D/∂q it is, for every kind,
q ⊙ (g − Σ q g), so terms of g that are constant over the vocabulary drop out. Each rule works on
one block of rows with float32 log-probabilities in which `LOG_FLOOR` stands for −inf.

Shapes: n rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distilllens.divergence import (
    INFINITE,
    LOG_FLOOR,
    MIXTURE_FLOOR,
    DivergenceOptions,
    head_gap_share,
)


def log_softmax_(logits_nV: Tensor) -> Tensor:
    """Turns logits into log-probabilities in place, with `LOG_FLOOR` in place of −inf.

    The maximum goes first: GPT-2's logits lie around −100, where float32 rounds log Σ exp to 8e-6.
    """
    logits_nV -= logits_nV.amax(-1, keepdim=True)
    logits_nV -= logits_nV.logsumexp(-1, keepdim=True)
    return logits_nV.clamp_(min=LOG_FLOOR)


def divergence_and_gradient_(
    kind: str, log_p: Tensor, log_q: Tensor, options: DivergenceOptions
) -> tuple[Tensor, Tensor]:
    """Returns ``value_n`` and ``gradient_nV`` of one divergence; may overwrite ``log_p`` only."""
    value_n, gradient_nV = ROW_RULES[kind](log_p, log_q, options)
    return value_n.masked_fill_(value_n > INFINITE, torch.inf), gradient_nV


def cross_entropy_and_gradient_(log_q: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """Returns −log q[target] and q − onehot(target); overwrites ``log_q`` with the latter."""
    column_n1 = targets_n.unsqueeze(1)
    value_n = -log_q.gather(1, column_n1).squeeze(1)
    gradient_nV = log_q.exp_()
    gradient_nV.scatter_add_(1, column_n1, gradient_nV.new_full(column_n1.shape, -1.0))
    return value_n, gradient_nV


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


def _project_(g: Tensor, q: Tensor) -> Tensor:
    """q ⊙ (g − Σ q g), in place of g."""
    return g.sub_(_dot(q, g).unsqueeze(1)).mul_(q)


def _forward_kl(log_p: Tensor, log_q: Tensor, _: DivergenceOptions) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    value_n = _dot(p, log_p.sub_(log_q))
    return value_n, log_q.exp().sub_(p)


def _reverse_kl(log_p: Tensor, log_q: Tensor, _: DivergenceOptions) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    ratio = torch.sub(log_q, log_p, out=log_p)
    value_n = _dot(q, ratio)
    return value_n, ratio.sub_(value_n.unsqueeze(1)).mul_(q)


def _mixed_kl(
    log_p: Tensor, log_q: Tensor, forward_weight: Tensor | float, reverse_weight: Tensor | float
) -> tuple[Tensor, Tensor]:
    """a KL(p‖q) + b KL(q‖p); the weights are numbers or one column per row."""
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.sub(log_q, log_p, out=log_p)
    forward_n1, reverse_n1 = -_dot(p, ratio).unsqueeze(1), _dot(q, ratio).unsqueeze(1)
    value_n1 = forward_weight * forward_n1 + reverse_weight * reverse_n1
    gradient = ratio.sub_(reverse_n1).mul_(reverse_weight).add_(forward_weight).mul_(q)
    return value_n1.squeeze(1), gradient.sub_(p.mul_(forward_weight))


def _jeffreys(log_p: Tensor, log_q: Tensor, o: DivergenceOptions) -> tuple[Tensor, Tensor]:
    return _mixed_kl(log_p, log_q, o.fkl_coeff, o.rkl_coeff)


def _adaptive_kl(log_p: Tensor, log_q: Tensor, o: DivergenceOptions) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    head_share_n1 = head_gap_share(p, (log_q.exp() - p).abs_(), mu=o.mu).unsqueeze(1)
    return _mixed_kl(log_p, log_q, head_share_n1, 1 - head_share_n1)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, o: DivergenceOptions) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.lerp(q, p, o.beta).clamp_(min=MIXTURE_FLOOR).log_()
    teacher_n = _dot(p, log_p.sub_(log_m))
    ratio = torch.sub(log_q, log_m, out=log_m)
    student_n = _dot(q, ratio)
    value_n = o.beta * teacher_n + (1 - o.beta) * student_n
    return value_n, ratio.sub_(student_n.unsqueeze(1)).mul_(q).mul_(1 - o.beta)


def _skewed_forward(log_p: Tensor, log_q: Tensor, o: DivergenceOptions) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    mixture = torch.lerp(q, p, o.alpha).clamp_(min=MIXTURE_FLOOR)
    value_n = _dot(p, log_p.sub_(mixture.log()))
    return value_n, _project_(p.div_(mixture).mul_(o.alpha - 1), q)


def _skewed_reverse(log_p: Tensor, log_q: Tensor, o: DivergenceOptions) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    mixture = torch.lerp(p, q, o.alpha).clamp_(min=MIXTURE_FLOOR)
    ratio = torch.sub(log_q, mixture.log(), out=log_p)
    value_n = _dot(q, ratio)
    return value_n, _project_(ratio.sub_(torch.div(q, mixture), alpha=o.alpha), q)


def _total_variation(log_p: Tensor, log_q: Tensor, _: DivergenceOptions) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    gap = torch.sub(q, log_p.exp_(), out=log_p)
    value_n = 0.5 * gap.abs().sum(-1)
    return value_n, _project_(gap.sign_().mul_(0.5), q)


ROW_RULES: dict[str, Callable[[Tensor, Tensor, DivergenceOptions], tuple[Tensor, Tensor]]] = {
    "fkl": _forward_kl,
    "rkl": _reverse_kl,
    "fkl+rkl": _jeffreys,
    "jsd": _jensen_shannon,
    "akl": _adaptive_kl,
    "skew_fkl": _skewed_forward,
    "skew_rkl": _skewed_reverse,
    "tvd": _total_variation,
}
