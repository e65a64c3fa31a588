"""The loss: cross entropy, final divergence and lens, as one weighted sum of fused terms.

loss = (1 − ρ) · CE + ρ · [ T² · D_final + λ · mean over K pairs of w_k · D_lens,k ]

Every part is a sum over response tokens here; the trainer divides once, by the response tokens of
the whole global batch.

Shapes: N response rows, D student width, E teacher width, K layer pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from distilllens.chunks import Term
from distilllens.config import CE_ONLY, ObjectiveConfig
from distilllens.divergence import DivergenceOptions
from distilllens.errors import ConfigError
from distilllens.layers import LayerPair


class Rows(NamedTuple):
    """Hidden states of the response rows, normed: what enters a model's head."""

    final: Tensor
    """Of the last block, [N, D] or [N, E]."""
    layers: list[Tensor]
    """Of the paired blocks in order, each [N, D] or [N, E]; empty without the lens."""


class DistillationObjective:
    """Turns rows of student and teacher into weighted terms, and their sums into named losses.

    Args:
        config: Approach, divergences and weights.
        pairs: Layer pairs of the lens; empty for all approaches but ``distill_lens``.

    Raises:
        ConfigError: ``lens.weights`` does not fit the pairs.
    """

    def __init__(self, config: ObjectiveConfig, pairs: Sequence[LayerPair] = ()) -> None:
        lens, approach = config.lens, config.approach
        self.distill_ratio = 0.0 if approach in CE_ONLY else config.kd_ratio
        uses_lens = approach == "distill_lens" and self.distill_ratio > 0 and lens.coeff > 0
        self.pairs = tuple(pairs) if uses_lens else ()
        self.divergence = config.divergence
        self.lens_divergence = lens.divergence
        self.lens_coeff = lens.coeff if uses_lens else 0.0
        self.pair_weights = _pair_weights(lens.weights, len(self.pairs))
        self.train_head = lens.train_head
        self.options = DivergenceOptions(
            beta=config.beta,
            mu=config.mu,
            alpha=config.alpha,
            fkl_coeff=config.fkl_coeff,
            rkl_coeff=config.rkl_coeff,
            temperature=config.temperature,
        )
        self.lens_options = DivergenceOptions(
            beta=lens.beta,
            mu=config.mu,
            alpha=config.alpha,
            fkl_coeff=config.fkl_coeff,
            rkl_coeff=config.rkl_coeff,
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return self.distill_ratio > 0

    @property
    def kd_weight(self) -> float:
        """Weight of the final divergence's sum, T² included (Hinton et al. 2015)."""
        return self.distill_ratio * self.options.temperature**2

    @property
    def lens_weights(self) -> list[float]:
        """Weight of each pair's sum."""
        share = self.distill_ratio * self.lens_coeff / max(1, len(self.pairs))
        return [share * weight for weight in self.pair_weights]

    def terms(
        self, student: Rows, teacher: Rows | None, targets_N: Tensor, scale: float
    ) -> list[Term]:
        """Builds the fused terms: the final layer first, then the pairs.

        Args:
            student: Rows of the student.
            teacher: Rows of the teacher; None: cross entropy only.
            targets_N: Token ids that the rows predict (int64).
            scale: Factor of the whole loss.
        """
        final = Term(
            student_hidden_ND=student.final,
            teacher_hidden_NE=None if teacher is None else teacher.final,
            targets_N=targets_N,
            kind=None if teacher is None else self.divergence,
            options=self.options,
            divergence_weight=scale * self.kd_weight,
            cross_entropy_weight=scale * (1 - self.distill_ratio),
        )
        if teacher is None:
            return [final]
        lens = [
            Term(
                student_hidden_ND=student_hidden_ND,
                teacher_hidden_NE=teacher_hidden_NE,
                kind=self.lens_divergence,
                options=self.lens_options,
                divergence_weight=scale * weight,
                train_head=self.train_head,
            )
            for student_hidden_ND, teacher_hidden_NE, weight in zip(
                student.layers, teacher.layers, self.lens_weights, strict=True
            )
        ]
        return [final, *lens]

    def losses(self, sums_K2: Sequence[Sequence[float]], num_tokens: float) -> dict[str, float]:
        """Names the means over tokens: ``loss``, its parts, and the lens by student layer.

        Args:
            sums_K2: Unweighted sums of cross entropy and divergence of each term in nats.
            num_tokens: Response tokens in those sums.
        """
        tokens = max(num_tokens, 1)
        losses = {"loss": 0.0, "loss/ce": sums_K2[0][0] / tokens}
        losses["loss"] = (1 - self.distill_ratio) * losses["loss/ce"]
        if self.needs_teacher:
            losses["loss/kd"] = sums_K2[0][1] / tokens
            losses["loss"] += self.kd_weight * losses["loss/kd"]
        if self.pairs:
            values = [pair_sums[1] / tokens for pair_sums in sums_K2[1:]]
            weighted = zip(self.pair_weights, values, strict=True)
            losses["loss/lens"] = sum(w * v for w, v in weighted) / len(values)
            losses["loss"] += self.distill_ratio * self.lens_coeff * losses["loss/lens"]
            for pair, value in zip(self.pairs, values, strict=True):
                losses[f"lens/{self.lens_divergence}/L{pair.student:02d}"] = value
        return losses


def _pair_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Returns one weight per pair, scaled to a mean of 1."""
    if weights is None or count == 0:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(
            f"lens.weights has {len(weights)} entries {list(weights)}, but there are {count} pairs"
        )
    total = sum(weights)
    if min(weights) < 0 or not total > 0:
        raise ConfigError(f"lens.weights={list(weights)} must be ≥ 0 and not all 0")
    return [weight * count / total for weight in weights]
