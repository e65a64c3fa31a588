"""Hidden-state baselines: student rows, mapped by a trained matrix, against the teacher's rows.

TinyBERT (Jiao et al. 2020) compares hidden states by mean squared error after a trained linear map,
DistilBERT (Sanh et al. 2019) by cosine. They ask the student for the teacher's representation, the
lens only for what that representation says about the next token.

Shapes: N response rows, D student width, E teacher width, K layer pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilllens.kernels.chunks import wide


class Projector(nn.Module):
    """A trained linear map without bias; computes in float32 whatever its weight is stored in.

    Args:
        width: D, of the rows that come in.
        out_width: E, of the rows that go out.
        generator: Draws the weight with variance 1 / D, so that rows keep their size.
    """

    def __init__(self, width: int, out_width: int, generator: torch.Generator) -> None:
        super().__init__()
        weight_ED = torch.empty(out_width, width)
        self.weight = nn.Parameter(weight_ED.normal_(std=width**-0.5, generator=generator))

    def forward(self, rows_ND: Tensor) -> Tensor:
        """Maps [N, D] to [N, E], float32 (float64 for a float64 weight)."""
        dtype = wide(self.weight.dtype)
        return F.linear(rows_ND.to(dtype), self.weight.to(dtype))


class HiddenComparison(nn.Module):
    """The distance between the paired layers' hidden rows, with one projector for each pair.

    There is a projector for equal widths too: nothing ties the student's basis to the teacher's,
    so that the map is part of the comparison and not a repair of shapes.

    Args:
        pairs: K, number of layer pairs.
        width: D, of the student's rows.
        teacher_width: E, of the teacher's rows.
        loss: ``mse``: mean over E of the squared difference; ``cosine``: 1 − cosine.
        seed: Of the run; the projectors start alike on all processes, and no other random number
            of the run depends on them.
    """

    def __init__(
        self,
        pairs: int,
        width: int,
        teacher_width: int,
        *,
        loss: Literal["mse", "cosine"],
        seed: int,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ModuleList(
            Projector(width, teacher_width, generator) for _ in range(pairs)
        )
        self.loss = loss

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Returns each pair's sum over the rows [K], float32.

        Args:
            student: Rows [N, D] of each pair; differentiable, as are the projectors.
            teacher: Rows [N, E] of each pair; constant.
        """
        sums = []
        for projector, student_ND, teacher_NE in zip(
            self.projectors, student, teacher, strict=True
        ):
            projected_NE = projector(student_ND)
            constant_NE = teacher_NE.to(projected_NE.dtype)
            if self.loss == "mse":
                distance_N = (projected_NE - constant_NE).square().mean(-1)
            else:
                # Both normed by hand: autograd may not keep the teacher's rows themselves, as they
                # come from inference mode.
                unit_NE = F.normalize(constant_NE, dim=-1)
                distance_N = 1 - (F.normalize(projected_NE, dim=-1) * unit_NE).sum(-1)
            sums.append(distance_N.sum())
        return torch.stack(sums)
