"""Divergences and cross entropy fused with the LM head: chunk by chunk, gradient in one pass.

The rows of a batch are projected through both LM heads a few hundred at a time; from each chunk of
logits the loss *and* its gradient (in closed form) are taken at once, so neither the logits of a
batch nor an autograd graph over the vocabulary ever exist. Extra memory: two logit buffers of one
chunk, and the gradients of the student's hidden rows and head.

Shapes: N rows (response tokens), n rows of a block, D student width, E teacher width, V vocabulary,
K terms (the final layer and the lens layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilllens.divergence import DivergenceOptions, check_kind
from distilllens.row_gradients import (
    cross_entropy_and_gradient_,
    divergence_and_gradient_,
    log_softmax_,
)

CPU_BUDGET_BYTES = 96 * 2**20
CUDA_BUDGET_BYTES = 768 * 2**20
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 128, 4096
CPU_BLOCK_BYTES = 4 * 2**20
"""On a CPU the elementwise part walks over blocks of this size, which stay in the cache."""
HEAD_BLOCK_ROWS = 8192
"""On a CPU a 16-bit head is widened to float32 so many vocabulary rows at a time."""


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a family does to its logits after the head: z → cap · tanh(scale · z / cap).

    Args:
        scale: Factor of the raw logits (Cohere; 1 / logits_scaling in Granite).
        softcap: The cap (Gemma 2: 30); None leaves the scaled logits as they are.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Transforms logits of any shape and dtype."""
        scaled = logits * self.scale if self.scale != 1.0 else logits
        if self.softcap is None:
            return scaled
        return self.softcap * torch.tanh(scaled / self.softcap)


Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Unembedding:
    """The way from hidden rows to logits: ``transform(hidden @ head.T + bias)``."""

    head_VD: Tensor
    bias_V: Tensor | None = None
    transform: Transform | None = None


@dataclass(frozen=True, kw_only=True)
class Term:
    """One set of student rows and what it is compared with: the final layer, or a lens layer.

    Args:
        student_hidden_ND: Rows that enter the student's head (normed); any floating dtype.
        teacher_hidden_NE: Rows that enter the teacher's head; needed by a divergence.
        targets_N: Token ids (int64); needed by the cross entropy.
        kind: Divergence, a key of `distilllens.divergence.DIVERGENCES`, or None.
        options: Of the divergence.
        divergence_weight: Factor of the divergence's sum in the loss.
        cross_entropy_weight: Factor of the cross entropy's sum in the loss; the sum itself is
            reported whenever there are targets.
        train_head: Let this term's gradient reach the student's head.
    """

    student_hidden_ND: Tensor
    teacher_hidden_NE: Tensor | None = None
    targets_N: Tensor | None = None
    kind: str | None = None
    options: DivergenceOptions = field(default_factory=DivergenceOptions)
    divergence_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    train_head: bool = True


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
        beta, mu, alpha, fkl_coeff, rkl_coeff, temperature: As in `distilllens.divergence`.

    Returns:
        The sum over rows in nats, float32; 0, still differentiable, for zero rows.

    Raises:
        ValueError: Unknown kind, or shapes that do not fit.
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
        ValueError: Unknown kind, or shapes that do not fit.
    """
    if vocab_size is None:
        vocab_size = student.head_VD.shape[0]
        if teacher is not None and teacher.head_VD.shape[0] != vocab_size:
            raise ValueError("heads of different size need vocab_size")
    for term in terms:
        _check_term(term, student=student, teacher=teacher)
    spec = _Spec(
        terms=tuple(terms),
        student=student,
        teacher=teacher,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows or default_chunk_rows(vocab_size, student.head_VD.device),
        want_grad=torch.is_grad_enabled(),
    )
    hidden = [term.student_hidden_ND for term in terms]
    return _FusedLinearTerms.apply(spec, student.head_VD, student.bias_V, *hidden)


def default_chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Returns how many rows to project at a time: a multiple of 128 within a memory budget.

    Each row needs two float32 logit rows and about a quarter of that for temporaries.
    """
    budget = CUDA_BUDGET_BYTES if device.type == "cuda" else CPU_BUDGET_BYTES
    rows = budget // (10 * vocab_size) // 128 * 128
    return max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, rows))


def _check_term(term: Term, *, student: Unembedding, teacher: Unembedding | None) -> None:
    rows, width = term.student_hidden_ND.shape
    if width != student.head_VD.shape[1]:
        raise ValueError(f"student rows of width {width}, head of {student.head_VD.shape[1]}")
    if term.kind is not None:
        check_kind(term.kind)
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


@dataclass(frozen=True, kw_only=True)
class _Spec:
    terms: tuple[Term, ...]
    student: Unembedding
    teacher: Unembedding | None
    vocab_size: int
    chunk_rows: int
    want_grad: bool


class _FusedLinearTerms(torch.autograd.Function):
    """Forward computes the gradients already; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, head_VD: Tensor, bias_V: Tensor | None, *hidden_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, need_head, need_bias, *need_hidden = ctx.needs_input_grad
        gradients = _Gradients(
            head_VD=_zeros32(head_VD) if spec.want_grad and need_head else None,
            bias_V=_zeros32(bias_V)
            if spec.want_grad and need_bias and bias_V is not None
            else None,
            hidden=[
                torch.empty_like(h) if spec.want_grad and need else None
                for h, need in zip(hidden_ND, need_hidden, strict=True)
            ],
        )
        loss, sums_K2 = _run(spec, gradients)
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


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    head_VD: Tensor | None  # float32: hundreds of chunks add up in it
    bias_V: Tensor | None
    hidden: list[Tensor | None]  # the hidden rows' own dtype: each row is written once


def _zeros32(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=_wide(like.dtype), device=like.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _run(spec: _Spec, gradients: _Gradients) -> tuple[Tensor, Tensor]:
    """Walks over terms and chunks; returns the loss and each term's two sums."""
    device, dtype = spec.student.head_VD.device, _wide(spec.student.head_VD.dtype)
    rows = min(spec.chunk_rows, max((len(t.student_hidden_ND) for t in spec.terms), default=0))
    student_buffer = torch.empty(rows, spec.vocab_size, dtype=dtype, device=device)
    teacher_buffer = torch.empty_like(student_buffer) if spec.teacher is not None else None
    sums_K2 = torch.zeros(len(spec.terms), 2, dtype=dtype, device=device)
    loss = torch.zeros((), dtype=dtype, device=device)
    for k, term in enumerate(spec.terms):
        for chunk in _slices(len(term.student_hidden_ND), spec.chunk_rows):
            _run_chunk(spec, term, chunk, gradients, k, student_buffer, teacher_buffer, sums_K2[k])
        # A weight of 0 must not turn an infinite divergence into a NaN of the loss.
        weights = (term.cross_entropy_weight, term.divergence_weight)
        for weight, value in zip(weights, sums_K2[k], strict=True):
            if weight != 0:
                loss = loss + weight * value
    return loss, sums_K2


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _run_chunk(
    spec: _Spec,
    term: Term,
    chunk: slice,
    gradients: _Gradients,
    k: int,
    student_buffer: Tensor,
    teacher_buffer: Tensor | None,
    sums_2: Tensor,
) -> None:
    """Projects one chunk, adds its sums, writes its gradients."""
    rows = chunk.stop - chunk.start
    hidden_nD = term.student_hidden_ND[chunk]
    student_nV = project_(hidden_nD, spec.student, out=student_buffer[:rows])
    teacher_nV = None
    if term.kind is not None:
        assert spec.teacher is not None and teacher_buffer is not None
        assert term.teacher_hidden_NE is not None
        teacher_nV = project_(
            term.teacher_hidden_NE[chunk], spec.teacher, out=teacher_buffer[:rows]
        )
    targets_n = None if term.targets_N is None else term.targets_N[chunk]
    for block in _slices(rows, _block_rows(student_nV)):
        sums_2 += _block_(
            spec,
            term,
            student_nV[block],
            None if teacher_nV is None else teacher_nV[block],
            None if targets_n is None else targets_n[block],
        )
    gradient_nV = student_nV  # _block_ left it there
    hidden_gradient = gradients.hidden[k]
    head_VD = spec.student.head_VD[: spec.vocab_size]
    if hidden_gradient is not None:
        hidden_gradient[chunk] = multiply(gradient_nV, head_VD).to(hidden_gradient.dtype)
    if term.train_head and gradients.head_VD is not None:
        accumulate_outer_(gradients.head_VD[: spec.vocab_size], gradient_nV, hidden_nD)
    if term.train_head and gradients.bias_V is not None:
        gradients.bias_V[: spec.vocab_size] += gradient_nV.sum(0)


def _block_rows(logits_nV: Tensor) -> int:
    if logits_nV.device.type == "cuda":
        return logits_nV.shape[0]
    return max(16, CPU_BLOCK_BYTES // (logits_nV.element_size() * logits_nV.shape[1]))


# --- The three products with the head ---------------------------------------------------------
# 16-bit inputs, float32 results: 16-bit logits would cost 3–26 % of the gradient. On CUDA the
# GEMM writes float32 itself; a CPU has no such GEMM, so the head is widened block by block.


def project_(hidden_nD: Tensor, side: Unembedding, *, out: Tensor) -> Tensor:
    """Writes ``hidden @ head.T + bias`` into ``out`` (wide), for ``out.shape[1]`` tokens."""
    head_VD = side.head_VD[: out.shape[1]]
    if hidden_nD.dtype == head_VD.dtype == out.dtype:
        torch.mm(hidden_nD, head_VD.T, out=out)
    elif out.device.type == "cuda" and hidden_nD.dtype == head_VD.dtype:
        torch.mm(hidden_nD, head_VD.T, out_dtype=out.dtype, out=out)
    else:
        wide_nD = hidden_nD.to(out.dtype)
        for block in _slices(head_VD.shape[0], HEAD_BLOCK_ROWS):
            torch.mm(wide_nD, head_VD[block].to(out.dtype).T, out=out[:, block])
    if side.bias_V is not None:
        out += side.bias_V[: out.shape[1]]
    return out


def multiply(gradient_nV: Tensor, head_VD: Tensor) -> Tensor:
    """Returns ``gradient @ head``, wide on a CPU, in the head's dtype on CUDA."""
    if gradient_nV.dtype == head_VD.dtype:
        return gradient_nV @ head_VD
    if gradient_nV.device.type == "cuda":
        return gradient_nV.to(head_VD.dtype) @ head_VD
    result = gradient_nV.new_zeros(gradient_nV.shape[0], head_VD.shape[1])
    for block in _slices(head_VD.shape[0], HEAD_BLOCK_ROWS):
        result.addmm_(gradient_nV[:, block], head_VD[block].to(gradient_nV.dtype))
    return result


def accumulate_outer_(total_VD: Tensor, gradient_nV: Tensor, hidden_nD: Tensor) -> None:
    """Adds ``gradient.T @ hidden`` to ``total_VD`` (wide)."""
    if gradient_nV.device.type == "cuda" and hidden_nD.dtype != total_VD.dtype:
        narrow_Vn = gradient_nV.to(hidden_nD.dtype).T
        total_VD += torch.mm(narrow_Vn, hidden_nD, out_dtype=total_VD.dtype)
    else:
        total_VD.addmm_(gradient_nV.T, hidden_nD.to(total_VD.dtype))


# --- One block of rows ------------------------------------------------------------------------


def _block_(
    spec: _Spec,
    term: Term,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    targets_n: Tensor | None,
) -> Tensor:
    """Returns the block's two sums; leaves the raw student logits' gradient in ``student_nV``."""
    temperature = term.options.temperature
    logits_nV, pull_back = _apply_transform(spec.student.transform, student_nV)
    sums_2 = student_nV.new_zeros(2)
    gradient_nV: Tensor | None = None
    if teacher_nV is not None:
        assert term.kind is not None and spec.teacher is not None
        if spec.teacher.transform is not None:
            teacher_nV = spec.teacher.transform(teacher_nV)
        # At T = 1 the cross entropy goes on with the student's log-probabilities.
        log_q = log_softmax_(logits_nV if temperature == 1 else logits_nV / temperature)
        log_p = log_softmax_(teacher_nV if temperature == 1 else teacher_nV / temperature)
        value_n, gradient_nV = divergence_and_gradient_(term.kind, log_p, log_q, term.options)
        sums_2[1] = value_n.sum()
        gradient_nV *= term.divergence_weight / temperature
    if targets_n is not None:
        log_q = (
            logits_nV if teacher_nV is not None and temperature == 1 else log_softmax_(logits_nV)
        )
        value_n, target_gradient_nV = cross_entropy_and_gradient_(log_q, targets_n)
        sums_2[0] = value_n.sum()
        target_gradient_nV *= term.cross_entropy_weight
        gradient_nV = (
            target_gradient_nV if gradient_nV is None else gradient_nV.add_(target_gradient_nV)
        )
    assert gradient_nV is not None, "a term has a divergence, targets or both"
    student_nV.copy_(pull_back(gradient_nV))
    return sums_2


def _apply_transform(
    transform: Transform | None, raw_nV: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns the transformed logits (may share memory) and the way of a gradient back through."""
    if transform is None:
        return raw_nV, lambda gradient: gradient
    if isinstance(transform, LogitTransform):
        logits_nV = transform(raw_nV)
        scale, cap = transform.scale, transform.softcap
        if cap is None:
            return logits_nV, lambda gradient: gradient * scale
        slope_nV = (logits_nV / cap).square_().neg_().add_(1).mul_(scale)  # scale · (1 − tanh²)
        return logits_nV, lambda gradient: gradient * slope_nV
    with torch.enable_grad():  # some other elementwise function: autograd, for one block
        leaf_nV = raw_nV.detach().clone().requires_grad_()
        output_nV = transform(leaf_nV)
    return output_nV.detach().clone(), lambda gradient: torch.autograd.grad(
        output_nV, leaf_nV, gradient
    )[0]
