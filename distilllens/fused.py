"""Divergences and cross entropy fused with the LM head: chunk by chunk, gradient in one pass.

The rows of a batch are projected through both LM heads a few hundred at a time; from each chunk of
logits the loss *and* its gradient (in closed form) are taken at once, so neither the logits of a
batch nor an autograd graph over the vocabulary ever exist. `kernels.chunks` does the work.

Shapes: N rows (response tokens), D student width, E teacher width, V vocabulary, K terms (the
final layer and the lens layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilllens.divergence import DivergenceOptions, check_kind, check_top_k
from distilllens.kernels.chunks import (
    Gradients,
    Spec,
    Term,
    Transform,
    Unembedding,
    cut_vocabulary,
    default_chunk_rows,
    run_terms,
    wide,
    zeros_wide,
)


def fused_linear_divergence(
    kind: str,
    *,
    student_hidden_ND: Float[Tensor, "N D"],
    student_head_VD: Float[Tensor, "V D"],
    teacher_hidden_NE: Float[Tensor, "N E"],
    teacher_head_VE: Float[Tensor, "V E"],
    student_bias_V: Float[Tensor, " V"] | None = None,
    teacher_bias_V: Float[Tensor, " V"] | None = None,
    student_transform: Transform | None = None,
    teacher_transform: Transform | None = None,
    chunk_rows: int | None = None,
    beta: float = 0.5,
    mu: float = 0.5,
    alpha: float = 0.1,
    fkl_coeff: float = 1.0,
    rkl_coeff: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Float[Tensor, ""]:
    """Equals ``divergence(kind, …).sum()`` of both heads' logits, without holding them.

    Args:
        kind: A key of `distilllens.divergence.DIVERGENCES`.
        student_hidden_ND: Any floating dtype; differentiable.
        student_head_VD: Any floating dtype; differentiable.
        teacher_hidden_NE: Any floating dtype; constant.
        teacher_head_VE: Any floating dtype; constant.
        student_bias_V: Added to the student's logits; differentiable.
        teacher_bias_V: Added to the teacher's logits; constant.
        student_transform: Elementwise, applied to the student's logits (float32).
        teacher_transform: Elementwise, applied to the teacher's logits (float32).
        chunk_rows: Rows projected at a time; default: by a memory budget.
        beta, mu, alpha, fkl_coeff, rkl_coeff, temperature, top_k: As in `distilllens.divergence`.

    Returns:
        The sum over rows in nats, float32; 0, still differentiable, for zero rows.

    Raises:
        ValueError: Unknown kind, ``top_k`` out of range, or shapes that do not fit.
    """
    if student_head_VD.shape[0] != teacher_head_VE.shape[0]:
        raise ValueError(
            f"student head has {student_head_VD.shape[0]} tokens, "
            f"teacher head {teacher_head_VE.shape[0]}"
        )
    options = DivergenceOptions(
        beta=beta,
        mu=mu,
        alpha=alpha,
        fkl_coeff=fkl_coeff,
        rkl_coeff=rkl_coeff,
        temperature=temperature,
        top_k=top_k,
    )
    term = Term(
        student_hidden_ND=student_hidden_ND,
        teacher_hidden_NE=teacher_hidden_NE,
        kind=kind,
        options=options,
    )
    loss, _ = fused_linear_terms(
        [term],
        student=Unembedding(
            head_VD=student_head_VD, bias_V=student_bias_V, transform=student_transform
        ),
        teacher=Unembedding(
            head_VD=teacher_head_VE, bias_V=teacher_bias_V, transform=teacher_transform
        ),
        chunk_rows=chunk_rows,
    )
    return loss


def fused_linear_terms(
    terms: Sequence[Term],
    *,
    student: Unembedding,
    teacher: Unembedding | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "K 2"]]:
    """Computes the weighted sum of several terms with one gradient buffer for the shared head.

    Args:
        terms: The final layer and the lens layers; numbers of rows may differ.
        student: Differentiable in ``head_VD`` and ``bias_V``.
        teacher: Constant; needed as soon as a term has a divergence.
        vocab_size: Use only the first so many tokens of both heads (cuts padded vocabularies
            without a copy); default: all, which must then be equally many.
        chunk_rows: Rows projected at a time; default: by a memory budget.

    Returns:
        ``loss``, float32, Σ weight · sum over the terms, differentiable in each term's
        ``student_hidden_ND``, in the head and its bias; and ``sums_K2``, float32, detached: each
        term's unweighted sum of cross entropy and of divergence in nats.

    Raises:
        ValueError: Unknown kind, ``top_k`` out of range, or shapes that do not fit.
    """
    if vocab_size is None:
        vocab_size = student.head_VD.shape[0]
        if teacher is not None and teacher.head_VD.shape[0] != vocab_size:
            raise ValueError("heads of different size need vocab_size")
    for term in terms:
        _check_term(term, student=student, teacher=teacher)
    dtype = wide(student.head_VD.dtype)
    spec = Spec(
        terms=tuple(terms),
        student=cut_vocabulary(student, vocab_size, dtype),
        teacher=None if teacher is None else cut_vocabulary(teacher, vocab_size, dtype),
        narrow_head_VD=student.head_VD.detach()[:vocab_size],
        vocab_size=vocab_size,
        chunk_rows=chunk_rows or default_chunk_rows(vocab_size, student.head_VD.device),
        want_grad=torch.is_grad_enabled(),
    )
    hidden = [term.student_hidden_ND for term in terms]
    return _FusedLinearTerms.apply(spec, student.head_VD, student.bias_V, *hidden)


def _check_term(term: Term, *, student: Unembedding, teacher: Unembedding | None) -> None:
    rows, width = term.student_hidden_ND.shape
    if width != student.head_VD.shape[1]:
        raise ValueError(f"student rows of width {width}, head of {student.head_VD.shape[1]}")
    if term.kind is not None:
        check_kind(term.kind)
        check_top_k(term.options.top_k)
        if teacher is None or term.teacher_hidden_NE is None:
            raise ValueError(f"divergence {term.kind} needs the teacher's rows and head")
        if term.teacher_hidden_NE.shape != (rows, teacher.head_VD.shape[1]):
            raise ValueError(
                f"teacher rows {tuple(term.teacher_hidden_NE.shape)}, "
                f"expected {(rows, teacher.head_VD.shape[1])}"
            )
    if term.kind is None and term.targets_N is None:
        raise ValueError("a term needs a divergence, targets or both")
    if term.targets_N is not None and term.targets_N.shape != (rows,):
        raise ValueError(f"targets {tuple(term.targets_N.shape)}, expected {(rows,)}")


class _FusedLinearTerms(torch.autograd.Function):
    """Forward computes the gradients already; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, head_VD: Tensor, bias_V: Tensor | None, *hidden_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, need_head, need_bias, *need_hidden = ctx.needs_input_grad
        gradients = Gradients(
            head_VD=zeros_wide(head_VD) if spec.want_grad and need_head else None,
            bias_V=zeros_wide(bias_V)
            if spec.want_grad and need_bias and bias_V is not None
            else None,
            hidden=[
                torch.empty_like(h) if spec.want_grad and need else None
                for h, need in zip(hidden_ND, need_hidden, strict=True)
            ],
        )
        loss, sums_K2 = run_terms(spec, gradients)
        if spec.want_grad:
            ctx.gradients = gradients
            ctx.head_dtype = head_VD.dtype
            ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(sums_K2)
        return loss, sums_K2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # frees the buffers as autograd takes them
        if gradients is None:
            raise RuntimeError("the fused loss can be differentiated only once")
        head, bias = gradients.head_VD, gradients.bias_V
        return (
            None,
            None if head is None else head.mul_(grad_loss).to(ctx.head_dtype),
            None if bias is None else bias.mul_(grad_loss).to(ctx.bias_dtype),
            *(None if g is None else g.mul_(grad_loss) for g in gradients.hidden),
        )
