"""The three matrix products with an LM head: which precision, and whose routine.

16-bit inputs, float32 logits: 16-bit logits would cost 3–26 % of the gradient, a 16-bit gradient
of the logits costs 0.15 %. On CUDA the product writes float32 itself; a CPU has no such product, so
there a 16-bit head is copied to float32 first.

float32 on a CPU goes to oneDNN where PyTorch was built with it, and not to `torch.mm`, which takes
MKL: that has no AVX-512 on AMD's processors and needs 1.6 to 2.1 times as long there.

Shapes: n rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(
    hidden_nD: Tensor, head_VD: Tensor, bias_V: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """Returns ``hidden @ head.T + bias``, at least float32.

    Args:
        hidden_nD: Any floating dtype; rounded to the head's.
        head_VD: On a CPU at least float32.
        bias_V: Any floating dtype.
        out: On CUDA: where the result goes, ``[n, V]``; rows may stand apart.
    """
    narrow_nD = hidden_nD.to(head_VD.dtype)
    if out is None and head_VD.dtype.itemsize < 4:  # on CUDA
        logits_nV = torch.mm(narrow_nD, head_VD.T, out_dtype=torch.float32)
    elif out is None:
        logits_nV = _rows_times(narrow_nD, head_VD)
    elif out.dtype == head_VD.dtype:
        logits_nV = torch.mm(narrow_nD, head_VD.T, out=out)
    else:
        logits_nV = torch.mm(narrow_nD, head_VD.T, out_dtype=out.dtype, out=out)
    if bias_V is not None:
        logits_nV += bias_V
    return logits_nV


def pull_back(gradient_nV: Tensor, head_VD: Tensor) -> Tensor:
    """Returns the hidden rows' gradient ``gradient @ head`` in the head's dtype."""
    return _rows_times(gradient_nV.to(head_VD.dtype), head_VD.T)


def accumulate_outer_(total_VD: Tensor, gradient_nV: Tensor, hidden_nD: Tensor) -> None:
    """Adds ``gradient.T @ hidden`` to ``total_VD``, at least float32."""
    if gradient_nV.device.type == "cuda" and hidden_nD.dtype != total_VD.dtype:
        narrow_Vn = gradient_nV.to(hidden_nD.dtype).T
        torch.addmm(total_VD, narrow_Vn, hidden_nD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(gradient_nV.to(total_VD.dtype).T, hidden_nD.to(total_VD.dtype))


def is_onednns(weight: Tensor) -> bool:
    """Tells whether products with this weight should go to oneDNN."""
    is_float32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_float32 and torch.backends.mkldnn.is_available()


def onednn_linear(rows: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Returns ``rows @ weight.T + bias`` by oneDNN, ``[…, M]``; float32 on a CPU, no gradients."""
    # The operator that PyTorch's compiler puts for a linear layer on a CPU.
    return torch.ops.mkldnn._linear_pointwise(rows, weight_MK, bias_M, "none", [], "")


def _rows_times(rows_nK: Tensor, weight_MK: Tensor) -> Tensor:
    """Returns ``rows @ weight.T``, [n, M]."""
    if rows_nK.dtype == weight_MK.dtype and is_onednns(weight_MK):
        return onednn_linear(rows_nK, weight_MK)
    return torch.mm(rows_nK, weight_MK.T)
