"""The two sides of a step: the student with its loss in one module, and the frozen teacher.

Shapes: B batch, T tokens, N response rows, D student width, E teacher width, K sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilllens.families import gather_rows, run_body
from distilllens.fused import fused_linear_terms
from distilllens.hidden import HiddenComparison
from distilllens.kernels.chunks import Unembedding
from distilllens.lens import LogitLens
from distilllens.objective import DistillationObjective, Rows


def lens_rows(
    lens: LogitLens,
    layers: list[int],
    input_ids_BT: Tensor,
    rows_N: Tensor,
    position_ids_BT: Tensor | None = None,
) -> Rows:
    """Runs a model's body and returns its response rows, ready for the head.

    Args:
        lens: Of the model.
        layers: Blocks whose lens is wanted, counted from 1.
        input_ids_BT: Token ids (int64), padded on the right.
        rows_N: Positions in the flattened batch whose next token is a response token (int64).
        position_ids_BT: Of packed records (int64); None: one record a row.
    """
    final_BTD, captured = run_body(lens.parts, input_ids_BT, layers, position_ids_BT)
    return Rows(
        final=gather_rows(final_BTD, rows_N),
        layers=[lens.normalize(gather_rows(captured[layer], rows_N)) for layer in layers],
    )


class Teacher:
    """The frozen teacher: hands over hidden rows, never logits.

    Args:
        lens: Of the teacher's model, which is in evaluation mode and has no gradients.
        layers: Blocks of the layer pairs, counted from 1.
        engine: What gathers a teacher in parts (`sharding`), block by block; None: it is whole.
    """

    def __init__(self, lens: LogitLens, layers: list[int], engine: Any = None) -> None:
        self.lens, self.layers, self.engine = lens, layers, engine

    def rows(
        self, input_ids_BT: Tensor, rows_N: Tensor, position_ids_BT: Tensor | None = None
    ) -> Rows:
        """Returns the response rows [N, E] of the last and the paired blocks; see `lens_rows`.

        All processes must call it together if the teacher is in parts.
        """
        # What is gathered must be writable later, which inference mode would not allow.
        with torch.inference_mode() if self.engine is None else torch.no_grad():
            return lens_rows(self.lens, self.layers, input_ids_BT, rows_N, position_ids_BT)

    def unembedding(self) -> Unembedding:
        """Returns the teacher's head."""
        return self.lens.unembedding()


class DistillationModule(nn.Module):
    """Student and objective in one ``forward``, so that DDP and every ZeRO stage see all of it.

    Args:
        student: Hugging Face causal LM, with or without LoRA.
        objective: Turns rows into the loss.
        lens: Of the student.
        teacher_unembedding: The teacher's head; None without a teacher. It is no parameter of this
            module: the teacher is neither trained, sharded nor saved with the student.
        vocab_size: Tokens that both heads share.
        hidden: Compares hidden states, with projectors that are trained along but are no part of
            the student; None without that term.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        objective: DistillationObjective,
        lens: LogitLens,
        teacher_unembedding: Unembedding | None,
        vocab_size: int,
        hidden: HiddenComparison | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.lens = lens
        self.teacher_unembedding = teacher_unembedding
        self.vocab_size = vocab_size
        self.hidden = hidden

    def forward(
        self,
        input_ids_BT: Tensor,
        rows_N: Tensor,
        targets_N: Tensor,
        teacher: Rows | None = None,
        scale: float = 1.0,
        position_ids_BT: Tensor | None = None,
        lens_shares: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss of one micro-batch.

        Args:
            input_ids_BT: Token ids (int64), padded on the right.
            rows_N: Positions in the flattened batch whose next token is a response token.
            targets_N: Those next tokens.
            teacher: The teacher's rows; None: cross entropy only (``sft``, and evaluation).
            scale: Factor of the loss.
            position_ids_BT: Of packed records (int64); None: one record a row.
            lens_shares: Factor of each pair of the lens in the loss; None: 1.

        Returns:
            ``loss``, float32 scalar: scale × weighted sum over the rows; and ``sums_K2``, float32,
            detached: sums of cross entropy and divergence of the final layer and of each pair of
            the lens, then 0 and the distance of each pair of hidden states.
        """
        layers = [] if teacher is None else [pair.student for pair in self.objective.pairs]
        student = lens_rows(self.lens, layers, input_ids_BT, rows_N, position_ids_BT)
        loss, sums_K2 = fused_linear_terms(
            self.objective.terms(student, teacher, targets_N, scale, lens_shares),
            student=self.lens.unembedding(),
            teacher=None if teacher is None else self.teacher_unembedding,
            vocab_size=self.vocab_size,
        )
        if teacher is None or self.hidden is None:
            return loss, sums_K2
        distances_k = self.hidden(student.layers, teacher.layers)
        loss = loss + scale * self.objective.hidden_weight * distances_k.sum()
        return loss, torch.cat([sums_K2, F.pad(distances_k.detach()[:, None], (1, 0))])
