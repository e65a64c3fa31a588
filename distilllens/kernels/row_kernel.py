"""One GPU kernel for the elementwise part of a chunk: two rows of logits in, their gradient out.

The same numbers as `row_gradients` behind a `LogitTransform`, without temporaries in
the GPU's memory. One program per row walks over the row in blocks, up to three times:

1. the maximum and the sum of exponentials of both rows, online (Milakov and Gimelshein 2018);
2. the centre Σ q g of the gradient q ⊙ (g − Σ q g), for the kinds that have one;
3. the value and the gradient.

Every walk but the first starts where the one before ended: the rows at work on all multiprocessors
are about as large as the L2 cache, from which walks in one direction would read nothing again.

A log-probability is (logit − maximum) / T − log Σ with the last two kept apart: their sum would be
rounded to 8e-6 where logits are around −100, as GPT-2's are. Nothing here hides a NaN: comparisons
choose the other branch for it, which keeps it.

Shapes: n rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from distilllens.divergence import (
    INFINITE,
    LOG_FLOOR,
    MIXTURE_FLOOR,
    DivergenceOptions,
    check_kind,
    head_gap_share,
)

BLOCK = 4096
"""Columns at a time: four per thread, one 16-byte load of each side."""
NUM_WARPS = 32
"""1,024 threads. They need 32 to 50 registers each, so one row per multiprocessor is at work, with
32 KB of loads under way, which is what keeps an H200's memory busy (4.8 TB/s × 0.7 µs / 132)."""

LOG2_E = math.log2(math.e)

# The device has exponentials and logarithms to base 2 only: logarithms stay in bits there.
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(math.log(2))
_LOG2_FLOOR = tl.constexpr(LOG_FLOOR * LOG2_E)
_MIXTURE_FLOOR = tl.constexpr(MIXTURE_FLOOR)
_INFINITE = tl.constexpr(INFINITE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def compare_rows(
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    targets_n: Tensor | None,
    *,
    kind: str | None,
    options: DivergenceOptions,
    divergence_weight: float,
    cross_entropy_weight: float,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    gradient_nV: Tensor,
) -> Tensor:
    """Compares rows of raw logits and writes the gradient with respect to the student's.

    The logits that are compared are ``cap · tanh(scale · raw / cap)``, or ``scale · raw`` without a
    cap. The cross entropy is taken at T = 1, the divergence at ``options.temperature``.

    Loads and stores are wide only where V and the row strides are multiples of 16: columns of −inf
    may fill a vocabulary up, if there is no cap. Their gradient is 0.

    Args:
        student_nV: float32, each row contiguous; −inf means probability 0.
        teacher_nV: The same for the teacher; None without a divergence.
        targets_n: Token ids (int64) for the cross entropy; None for none. An id outside the
            vocabulary makes the cross entropy NaN.
        kind: A key of `distilllens.divergence.DIVERGENCES`, or None without a teacher.
        options: Of the divergence.
        divergence_weight: Factor of the divergence in the gradient.
        cross_entropy_weight: Factor of the cross entropy in the gradient.
        student_scale, student_softcap: The student's `distilllens.kernels.chunks.LogitTransform`.
        teacher_scale, teacher_softcap: The teacher's.
        gradient_nV: Is overwritten; any floating dtype, each row contiguous. May be
            ``student_nV`` itself, but not share its memory otherwise.

    Returns:
        ``sums_2``, float32: the sums over the rows of cross entropy and of divergence, in nats,
        without the weights. Bit for bit the same in every call.

    Raises:
        ValueError: Unknown kind.
    """
    rows, vocab_size = student_nV.shape
    assert (kind is None) == (teacher_nV is None)
    assert kind is not None or targets_n is not None, "rows have a divergence, targets or both"
    for tensor_nV in (student_nV, gradient_nV, *([] if teacher_nV is None else [teacher_nV])):
        assert tensor_nV.shape == student_nV.shape and tensor_nV.stride(1) == 1
        assert tensor_nV.dtype == torch.float32 or tensor_nV is gradient_nV
    values_n2 = torch.empty(rows, 2, dtype=torch.float32, device=student_nV.device)
    if rows == 0:
        return values_n2.sum(0)
    shares_n, forward, reverse, mix = None, 0.0, 0.0, 0.0
    if kind is not None:
        assert teacher_nV is not None
        check_kind(kind)
        forward, reverse, mix = _coefficients(kind, options)
        if kind == "akl":
            p_nV = _probs(teacher_nV, teacher_scale, teacher_softcap, options.temperature)
            gap_nV = _probs(student_nV, student_scale, student_softcap, options.temperature)
            shares_n = head_gap_share(p_nV, gap_nV.sub_(p_nV).abs_(), mu=options.mu)
    temperature = 1.0 if kind is None else options.temperature
    with torch.cuda.device_of(student_nV):  # Triton launches on the current device
        _compare_row[(rows,)](
            student_nV,
            teacher_nV,
            None if targets_n is None else targets_n.contiguous(),
            shares_n,
            gradient_nV,
            values_n2,
            vocab_size,
            student_nV.stride(0),
            0 if teacher_nV is None else teacher_nV.stride(0),
            gradient_nV.stride(0),
            LOG2_E / temperature,
            forward,
            reverse,
            mix,
            divergence_weight / temperature,
            float(cross_entropy_weight),  # an integer 1 would be compiled in
            KIND=kind,
            TEMPERED=targets_n is not None and temperature != 1,
            STUDENT_SCALE=student_scale,
            STUDENT_SOFTCAP=student_softcap,
            TEACHER_SCALE=teacher_scale,
            TEACHER_SOFTCAP=teacher_softcap,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return values_n2.sum(0)


def _coefficients(kind: str, options: DivergenceOptions) -> tuple[float, float, float]:
    """Returns the weights of KL(p‖q) and KL(q‖p), and the share in the mixture."""
    if kind == "fkl+rkl":
        return float(options.fkl_coeff), float(options.rkl_coeff), 0.0
    mix = options.beta if kind == "jsd" else options.alpha
    return float(kind == "fkl"), float(kind == "rkl"), mix


def _probs(raw_nV: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    logits_nV = raw_nV * scale
    if softcap is not None:
        logits_nV = softcap * torch.tanh(logits_nV / softcap)
    return torch.softmax(logits_nV / temperature, dim=-1)


# --- On the device: every tensor here is one block of a row, float32 --------------------------
# Past the row's end a logit is −inf, so its probability is 0 and it adds 0 to every sum.


@triton.jit
def _load_logits(
    row_ptr: tl.tensor,
    columns: tl.tensor,
    vocab_size: tl.tensor,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """Transformed logits of the columns."""
    inside = columns < vocab_size
    logits = tl.load(row_ptr + columns, mask=inside, other=float("-inf")) * SCALE
    if SOFTCAP is not None:
        falling = tl.exp2(tl.abs(logits) * (-2 * _LOG2_E / SOFTCAP))
        capped = SOFTCAP * (1 - falling) / (1 + falling)
        logits = tl.where(inside, tl.where(logits < 0, -capped, capped), float("-inf"))
    return logits


@triton.jit
def _add_exp(total: tl.tensor, top: tl.tensor, logits: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """Σ exp((logit − top) / T) with one more logit, which becomes the top if it is higher."""
    rise = logits - top
    smaller = tl.exp2(-tl.abs(rise) * rate)  # the other of the two exponentials is 1
    return tl.where(rise > 0, total * smaller + 1, total + smaller)


@triton.jit
def _log2_total(total: tl.tensor, top: tl.tensor, row_top: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """The lanes' sums, each relative to its own top, as one logarithm relative to the row's."""
    return tl.log2(tl.sum(total * tl.exp2((top - row_top) * rate)))


@triton.jit
def _log2_probs(
    logits: tl.tensor, top: tl.tensor, log2_total: tl.tensor, rate: tl.tensor
) -> tl.tensor:
    log2_probs = (logits - top) * rate - log2_total
    return tl.where(log2_probs < _LOG2_FLOOR, _LOG2_FLOOR, log2_probs)


@triton.jit
def _mixture(a: tl.tensor, b: tl.tensor, share: tl.tensor) -> tl.tensor:
    """share · a + (1 − share) · b, never 0."""
    mixture = share * a + (1 - share) * b
    return tl.where(mixture < _MIXTURE_FLOOR, _MIXTURE_FLOOR, mixture)


@triton.jit
def _terms(
    log2_p: tl.tensor,
    log2_q: tl.tensor,
    p: tl.tensor,
    q: tl.tensor,
    forward: tl.tensor,
    reverse: tl.tensor,
    mix: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """The value's summands and g; the gradient is q ⊙ (g − Σ q g) + forward · (q − p)."""
    if KIND == "jsd":
        log2_m = tl.log2(_mixture(p, q, mix))
        g = (1 - mix) * _LN_2 * (log2_q - log2_m)
        return mix * _LN_2 * p * (log2_p - log2_m) + q * g, g
    elif KIND == "skew_fkl":
        mixture = _mixture(p, q, mix)
        return p * _LN_2 * (log2_p - tl.log2(mixture)), (mix - 1) * p / mixture
    elif KIND == "skew_rkl":
        mixture = _mixture(q, p, mix)
        ratio = _LN_2 * (log2_q - tl.log2(mixture))
        return q * ratio, ratio - mix * q / mixture
    elif KIND == "tvd":
        gap = q - p
        return 0.5 * tl.abs(gap), tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, gap))
    else:  # forward · KL(p‖q) + reverse · KL(q‖p)
        ratio = _LN_2 * (log2_q - log2_p)
        return (reverse * q - forward * p) * ratio, reverse * ratio


@triton.jit
def _normalisers(
    student_ptr: tl.tensor,
    teacher_ptr: tl.tensor,
    vocab_size: tl.tensor,
    rate: tl.tensor,
    KIND: tl.constexpr,
    TEMPERED: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """First walk: the student's maximum and log₂ Σ at T and at 1, the teacher's two."""
    student_top = tl.full([BLOCK], _LOWEST, tl.float32)
    teacher_top = tl.full([BLOCK], _LOWEST, tl.float32)
    student_total = tl.zeros([BLOCK], tl.float32)
    teacher_total = tl.zeros([BLOCK], tl.float32)
    unit_total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.cdiv(vocab_size, BLOCK)):
        columns = i * BLOCK + tl.arange(0, BLOCK)
        logits = _load_logits(student_ptr, columns, vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP)
        student_total = _add_exp(student_total, student_top, logits, rate)
        if TEMPERED:
            unit_total = _add_exp(unit_total, student_top, logits, _LOG2_E)
        student_top = tl.where(logits > student_top, logits, student_top)
        if KIND is not None:
            logits = _load_logits(teacher_ptr, columns, vocab_size, TEACHER_SCALE, TEACHER_SOFTCAP)
            teacher_total = _add_exp(teacher_total, teacher_top, logits, rate)
            teacher_top = tl.where(logits > teacher_top, logits, teacher_top)
    student_max = tl.max(student_top)
    student_log2 = _log2_total(student_total, student_top, student_max, rate)
    unit_log2 = student_log2
    if TEMPERED:
        unit_log2 = _log2_total(unit_total, student_top, student_max, _LOG2_E)
    teacher_max, teacher_log2 = student_max, student_log2
    if KIND is not None:
        teacher_max = tl.max(teacher_top)
        teacher_log2 = _log2_total(teacher_total, teacher_top, teacher_max, rate)
    return student_max, student_log2, unit_log2, teacher_max, teacher_log2


@triton.jit
def _compare_row(
    student_ptr: tl.tensor,
    teacher_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    gradient_ptr: tl.tensor,
    values_ptr: tl.tensor,
    vocab_size: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    gradient_stride: tl.tensor,
    rate: tl.tensor,  # bits per logit: log₂ e / T
    forward: tl.tensor,
    reverse: tl.tensor,
    mix: tl.tensor,
    divergence_weight: tl.tensor,  # divided by T
    cross_entropy_weight: tl.tensor,
    KIND: tl.constexpr,
    TEMPERED: tl.constexpr,  # the cross entropy needs a normaliser of its own
    STUDENT_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # rows × vocabulary may pass 2³¹
    student_ptr += row * student_stride
    gradient_ptr += row * gradient_stride
    if KIND is not None:
        teacher_ptr += row * teacher_stride
    if KIND == "akl":
        forward = tl.load(shares_ptr + row)
        reverse = 1 - forward
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(vocab_size, BLOCK)
    student_max, student_log2, unit_log2, teacher_max, teacher_log2 = _normalisers(
        student_ptr,
        teacher_ptr,
        vocab_size,
        rate,
        KIND,
        TEMPERED,
        STUDENT_SCALE,
        STUDENT_SOFTCAP,
        TEACHER_SCALE,
        TEACHER_SOFTCAP,
        BLOCK,
    )

    centre = 0.0
    HAS_CENTRE: tl.constexpr = KIND is not None and KIND != "fkl"
    if HAS_CENTRE:
        sums = tl.zeros([BLOCK], tl.float32)
        for i in range(blocks):
            columns = (blocks - 1 - i) * BLOCK + lanes
            logits = _load_logits(student_ptr, columns, vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP)
            log2_q = _log2_probs(logits, student_max, student_log2, rate)
            logits = _load_logits(teacher_ptr, columns, vocab_size, TEACHER_SCALE, TEACHER_SOFTCAP)
            log2_p = _log2_probs(logits, teacher_max, teacher_log2, rate)
            p, q = tl.exp2(log2_p), tl.exp2(log2_q)
            _, g = _terms(log2_p, log2_q, p, q, forward, reverse, mix, KIND)
            sums += q * g
        centre = tl.sum(sums)

    divergence = tl.zeros([BLOCK], tl.float32)
    cross_entropy = tl.zeros([BLOCK], tl.float32)  # in bits
    target = -1
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row)
    for i in range(blocks):
        columns = (i if HAS_CENTRE else blocks - 1 - i) * BLOCK + lanes
        logits = _load_logits(student_ptr, columns, vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP)
        log2_q = _log2_probs(logits, student_max, student_log2, rate)
        q = tl.exp2(log2_q)
        gradient = tl.zeros([BLOCK], tl.float32)
        if KIND is not None:
            others = _load_logits(teacher_ptr, columns, vocab_size, TEACHER_SCALE, TEACHER_SOFTCAP)
            log2_p = _log2_probs(others, teacher_max, teacher_log2, rate)
            p = tl.exp2(log2_p)
            value, g = _terms(log2_p, log2_q, p, q, forward, reverse, mix, KIND)
            divergence += value
            gradient = divergence_weight * (q * (g - centre) + forward * (q - p))
        if targets_ptr is not None:
            if TEMPERED:
                log2_q = _log2_probs(logits, student_max, unit_log2, _LOG2_E)
                q = tl.exp2(log2_q)
            hit = columns == target
            cross_entropy -= tl.where(hit, log2_q, 0.0)
            gradient += cross_entropy_weight * tl.where(hit, q - 1, q)
        gradient *= STUDENT_SCALE
        if STUDENT_SOFTCAP is not None:
            tanh = logits / STUDENT_SOFTCAP
            gradient *= 1 - tanh * tanh
        gradient = gradient.to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + columns, gradient, mask=columns < vocab_size)

    row_divergence = tl.sum(divergence)
    row_divergence = tl.where(row_divergence > _INFINITE, float("inf"), row_divergence)
    row_cross_entropy = _LN_2 * tl.sum(cross_entropy)
    if targets_ptr is not None:
        known = (target >= 0) & (target < vocab_size)
        row_cross_entropy = tl.where(known, row_cross_entropy, float("nan"))
    tl.store(values_ptr + 2 * row, row_cross_entropy)
    tl.store(values_ptr + 2 * row + 1, row_divergence)
