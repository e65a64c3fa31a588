"""One pass over rows in chunks: project, compare, and write the gradient at once.

What `distilllens.fused` differentiates is computed here: both heads' logits of a few hundred rows
at a time, the loss and its closed-form gradient from them, and the products of that gradient with
head and rows. The part between the products is `row_gradients` on a CPU, in blocks that
stay in its cache, and one kernel, `row_kernel`, on a GPU; the kernel does not know
top-k, so terms with it take the blocks there too. Extra memory: two or three buffers of one chunk,
used for all terms, and the gradients themselves.

Shapes: N rows (response tokens), n rows of a chunk or block, D student width, E teacher width,
V vocabulary, K terms (the final layer and the lens layers).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from distilllens.divergence import DivergenceOptions, merges_tokens
from distilllens.kernels.products import accumulate_outer_, project, pull_back
from distilllens.kernels.row_gradients import (
    Scratch,
    add_cross_entropy_gradient_,
    cross_entropy,
    divergence_and_gradient_,
    softmax_,
    top_k_divergence_and_gradient_,
)

CPU_BUDGET_BYTES = 128 * 2**20
CUDA_BUDGET_BYTES = 768 * 2**20
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 128, 4096
CPU_BLOCK_BYTES = 9 * 2**18
"""On a CPU the elementwise part walks over blocks of this size per thread, which stay in the
cache: 0.25 ms a row of 50,257 tokens, against 0.48 ms in blocks six times as large."""
CUDA_BLOCK_ROWS = 256
"""On a GPU, where blocks are for what the kernel does not know, this bounds their temporaries."""


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


def default_chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Returns how many rows to project at a time: a multiple of 128 within a memory budget.

    Each row needs two float32 logit rows and about a quarter of that for temporaries.
    """
    budget = CUDA_BUDGET_BYTES if device.type == "cuda" else CPU_BUDGET_BYTES
    rows = budget // (10 * vocab_size) // 128 * 128
    return max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, rows))


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that one pass needs but the buffers of its gradients."""

    terms: tuple[Term, ...]
    student: Unembedding
    teacher: Unembedding | None
    narrow_head_VD: Tensor  # the student's head in its own dtype, for the hidden rows' gradient
    vocab_size: int
    chunk_rows: int
    want_grad: bool


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Where one pass writes; None where no gradient is wanted."""

    head_VD: Tensor | None  # float32: hundreds of chunks add up in it
    bias_V: Tensor | None
    hidden: list[Tensor | None]  # the hidden rows' own dtype: each row is written once


def zeros_wide(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=wide(like.dtype), device=like.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def cut_vocabulary(side: Unembedding, vocab_size: int, dtype: torch.dtype) -> Unembedding:
    """Cuts a head to ``vocab_size`` tokens (a view); on a CPU a 16-bit one is copied to float32."""
    head_VD = side.head_VD[:vocab_size]
    bias_V = None if side.bias_V is None else side.bias_V[:vocab_size]
    if head_VD.device.type == "cpu":
        head_VD = head_VD.to(dtype)
    return Unembedding(head_VD=head_VD, bias_V=bias_V, transform=side.transform)


def run_terms(spec: Spec, gradients: Gradients) -> tuple[Tensor, Tensor]:
    """Walks over terms and chunks; returns the loss and each term's two sums."""
    rows = min(spec.chunk_rows, max((len(t.student_hidden_ND) for t in spec.terms), default=0))
    in_kernel = [_uses_kernel(spec, term) for term in spec.terms]
    buffers = _allocate(spec, rows) if any(in_kernel) else None
    head_VD = spec.student.head_VD
    sums_K2 = head_VD.new_zeros(len(spec.terms), 2, dtype=wide(head_VD.dtype))
    loss = sums_K2.new_zeros(())
    for k, term in enumerate(spec.terms):
        for chunk in _slices(len(term.student_hidden_ND), spec.chunk_rows):
            room = buffers if in_kernel[k] else None
            sums_K2[k] += _run_chunk(spec, term, chunk, gradients, k, room)
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
    spec: Spec, term: Term, chunk: slice, gradients: Gradients, k: int, buffers: Buffers | None
) -> Tensor:
    """Projects one chunk, writes its gradients, returns its two sums."""
    hidden_nD = term.student_hidden_ND[chunk]
    teacher_nE = None
    if term.kind is not None:
        assert term.teacher_hidden_NE is not None
        teacher_nE = term.teacher_hidden_NE[chunk]
    targets_n = None if term.targets_N is None else term.targets_N[chunk]
    compare = _compare_in_blocks if buffers is None else partial(_compare_in_kernel, buffers)
    sums_2, gradient_nV = compare(spec, term, hidden_nD, teacher_nE, targets_n)
    hidden_gradient = gradients.hidden[k]
    if hidden_gradient is not None:
        hidden_gradient[chunk] = pull_back(gradient_nV, spec.narrow_head_VD)
    if term.train_head and gradients.head_VD is not None:
        accumulate_outer_(gradients.head_VD[: spec.vocab_size], gradient_nV, hidden_nD)
    if term.train_head and gradients.bias_V is not None:
        total_V = gradients.bias_V[: spec.vocab_size]
        total_V += gradient_nV.sum(0, dtype=total_V.dtype)
    return sums_2


# --- On a GPU: one kernel over buffers that all chunks share -----------------------------------

KERNEL_ON = defaultdict(bool, {"cuda": True})
"""Types of devices on which `distilllens.kernels.row_kernel` compares."""
COLUMNS = 64
"""Rows of the buffers begin at multiples of this: 50,257 columns would leave the matrix products
and the kernel with unaligned loads."""


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Room for the logits of one chunk and for their gradient, rows × padded vocabulary."""

    student: Tensor
    teacher: Tensor | None
    gradient: Tensor
    """In the head's own dtype."""


def _uses_kernel(spec: Spec, term: Term) -> bool:
    """Whether the device has the kernel, and the kernel the dtype, both transforms, all tokens."""
    if merges_tokens(term.options.top_k, spec.vocab_size):
        return False
    head_VD = spec.student.head_VD
    sides = [side for side in (spec.student, spec.teacher) if side is not None]
    known = all(isinstance(side.transform, LogitTransform | None) for side in sides)
    return KERNEL_ON[head_VD.device.type] and wide(head_VD.dtype) == torch.float32 and known


def _allocate(spec: Spec, rows: int) -> Buffers:
    size = (rows, -(-spec.vocab_size // COLUMNS) * COLUMNS)
    # The columns behind the vocabulary stay −inf: probability 0.
    student = torch.full(size, -torch.inf, device=spec.student.head_VD.device)
    return Buffers(
        student=student,
        teacher=None if spec.teacher is None else student.clone(),
        gradient=torch.empty_like(student, dtype=spec.narrow_head_VD.dtype),
    )


def _compare_in_kernel(
    buffers: Buffers,
    spec: Spec,
    term: Term,
    student_nD: Tensor,
    teacher_nE: Tensor | None,
    targets_n: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns a chunk's two sums and the gradient of the raw student logits."""
    from distilllens.kernels.row_kernel import (
        compare_rows,  # Triton comes with the CUDA builds of PyTorch
    )

    rows, vocab = len(student_nD), spec.vocab_size
    student_nV, gradient_nV, teacher_nV = buffers.student[:rows], buffers.gradient[:rows], None
    side = spec.student
    project(student_nD, side.head_VD, side.bias_V, out=student_nV[:, :vocab])
    student = _logit_transform(side)
    teacher = LogitTransform()
    if teacher_nE is not None:
        assert spec.teacher is not None and buffers.teacher is not None
        side, teacher_nV = spec.teacher, buffers.teacher[:rows]
        project(teacher_nE, side.head_VD, side.bias_V, out=teacher_nV[:, :vocab])
        teacher = _logit_transform(side)
    if student.softcap is not None or teacher.softcap is not None:
        # A soft cap would turn the −inf behind the vocabulary into a finite logit.
        student_nV, gradient_nV = student_nV[:, :vocab], gradient_nV[:, :vocab]
        teacher_nV = None if teacher_nV is None else teacher_nV[:, :vocab]
    sums_2 = compare_rows(
        student_nV,
        teacher_nV,
        targets_n,
        kind=term.kind,
        options=term.options,
        divergence_weight=term.divergence_weight,
        cross_entropy_weight=term.cross_entropy_weight,
        student_scale=student.scale,
        student_softcap=student.softcap,
        teacher_scale=teacher.scale,
        teacher_softcap=teacher.softcap,
        gradient_nV=gradient_nV,
    )
    return sums_2, gradient_nV[:, :vocab]


def _logit_transform(side: Unembedding) -> LogitTransform:
    transform = side.transform or LogitTransform()
    assert isinstance(transform, LogitTransform)
    return transform


# --- Elsewhere: the closed forms, block by block ------------------------------------------------


def _compare_in_blocks(
    spec: Spec,
    term: Term,
    student_nD: Tensor,
    teacher_nE: Tensor | None,
    targets_n: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns a chunk's two sums and the gradient of the raw student logits."""
    student_nV = project(student_nD, spec.student.head_VD, spec.student.bias_V)
    teacher_nV = None
    if teacher_nE is not None:
        assert spec.teacher is not None
        teacher_nV = project(teacher_nE, spec.teacher.head_VD, spec.teacher.bias_V)
    sums_2 = student_nV.new_zeros(2)
    scratch = Scratch.like(student_nV[: _block_rows(student_nV)])
    for block in _slices(len(student_nV), len(scratch.p)):
        sums_2 += _block_(
            spec,
            term,
            student_nV[block],
            None if teacher_nV is None else teacher_nV[block],
            None if targets_n is None else targets_n[block],
            scratch.cut(block.stop - block.start),
        )
    return sums_2, student_nV  # _block_ left the gradient there


def _block_rows(logits_nV: Tensor) -> int:
    if logits_nV.device.type == "cuda":
        return min(CUDA_BLOCK_ROWS, len(logits_nV))
    rows = CPU_BLOCK_BYTES // (logits_nV.element_size() * logits_nV.shape[1])
    return max(2, rows) * torch.get_num_threads()


def _block_(
    spec: Spec,
    term: Term,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    targets_n: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """Returns the block's two sums; leaves the raw student logits' gradient in ``student_nV``."""
    temperature = term.options.temperature
    logits_nV, through_transform = _apply_transform(spec.student.transform, student_nV)
    sums_2 = student_nV.new_zeros(2)
    gradient_nV, log_q, q = None, None, None
    if teacher_nV is not None:
        assert term.kind is not None and spec.teacher is not None
        if spec.teacher.transform is not None:
            teacher_nV = spec.teacher.transform(teacher_nV)
        top_k = term.options.top_k
        if merges_tokens(top_k, spec.vocab_size):
            value_n, gradient_nV = top_k_divergence_and_gradient_(
                term.kind, teacher_nV, logits_nV, top_k, term.options, scratch.more
            )
        else:
            log_q, q = softmax_(_divided(logits_nV, temperature), scratch.q)
            log_p, p = softmax_(_divided(teacher_nV, temperature), scratch.p)
            value_n, gradient_nV = divergence_and_gradient_(
                term.kind, log_p, p, log_q, q, term.options, scratch.more
            )
        sums_2[1] = value_n.sum()
    if targets_n is not None:
        if log_q is None or temperature != 1:
            log_q, q = softmax_(logits_nV, scratch.q)
        sums_2[0] = cross_entropy(log_q, targets_n).sum()
    # The student's logits are done with: their gradient takes their place.
    if gradient_nV is None:
        student_nV.zero_()
    else:
        torch.mul(gradient_nV, term.divergence_weight / temperature, out=student_nV)
    if targets_n is not None and q is not None and term.cross_entropy_weight != 0:
        add_cross_entropy_gradient_(student_nV, q, targets_n, term.cross_entropy_weight)
    if through_transform is not None:
        student_nV.copy_(through_transform(student_nV))
    return sums_2


def _divided(logits_nV: Tensor, temperature: float) -> Tensor:
    return logits_nV if temperature == 1 else logits_nV / temperature


def _apply_transform(
    transform: Transform | None, raw_nV: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Returns the transformed logits and the way of a gradient back through; None: unchanged."""
    if transform is None:
        return raw_nV, None
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
