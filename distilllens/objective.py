"""The loss: cross entropy, final divergence, lens and hidden states, as one weighted sum.

loss = (1 − ρ) · CE + ρ · [ T² · D_final + λ · mean over K pairs of w_k · D_lens,k
                            + γ · mean over K pairs of D_hidden,k ]

Every part is a sum over response tokens here; the trainer divides once, by the response tokens of
the whole global batch.

Shapes: N response rows, D student width, E teacher width, K layer pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distilllens.config import CE_ONLY, LensConfig, ObjectiveConfig
from distilllens.divergence import DivergenceOptions
from distilllens.errors import ConfigError
from distilllens.kernels.chunks import Term
from distilllens.layers import LayerPair

BY_DEPTH = ("deepest_first", "shallowest_first")
"""Schedules of the lens by which its pairs differ."""


class Rows(NamedTuple):
    """Hidden states of the response rows, normed: what enters a model's head."""

    final: Tensor
    """Of the last block, [N, D] or [N, E]."""
    layers: list[Tensor]
    """Of the paired blocks in order, each [N, D] or [N, E]; empty where no pair is compared."""


class DistillationObjective:
    """Turns rows of student and teacher into weighted terms, and their sums into named losses.

    Args:
        config: Approach, divergences and weights.
        pairs: Layer pairs of the lens and of the hidden states; empty without both.

    Raises:
        ConfigError: ``lens.weights`` does not fit the pairs.
    """

    def __init__(self, config: ObjectiveConfig, pairs: Sequence[LayerPair] = ()) -> None:
        lens, hidden, approach = config.lens, config.hidden, config.approach
        self.distill_ratio = 0.0 if approach in CE_ONLY else config.kd_ratio
        uses_lens = approach == "distill_lens" and self.distill_ratio > 0 and lens.coeff > 0
        uses_hidden = self.distill_ratio > 0 and hidden.coeff > 0
        self.needs_pairs = uses_lens or uses_hidden
        self.pairs = tuple(pairs) if self.needs_pairs else ()
        self.lens_pairs = self.pairs if uses_lens else ()
        self.hidden_pairs = self.pairs if uses_hidden else ()
        self.divergence = config.divergence
        self.lens_divergence = lens.divergence
        self.lens_coeff = lens.coeff if uses_lens else 0.0
        self.lens_schedule = lens.schedule
        self.pair_weights = _pair_weights(lens, self.lens_pairs)
        self.hidden_loss = hidden.loss
        self.hidden_coeff = hidden.coeff if uses_hidden else 0.0
        self.train_head = lens.train_head
        self.options = DivergenceOptions(
            beta=config.beta,
            mu=config.mu,
            alpha=config.alpha,
            fkl_coeff=config.fkl_coeff,
            rkl_coeff=config.rkl_coeff,
            temperature=config.temperature,
            top_k=config.top_k,
        )
        self.lens_options = DivergenceOptions(
            beta=lens.beta,
            mu=lens.mu,
            alpha=lens.alpha,
            fkl_coeff=lens.fkl_coeff,
            rkl_coeff=lens.rkl_coeff,
            top_k=lens.top_k,
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
        """Weight of each pair's sum at the schedule's full height."""
        share = self.distill_ratio * self.lens_coeff / max(1, len(self.lens_pairs))
        return [share * weight for weight in self.pair_weights]

    @property
    def hidden_weight(self) -> float:
        """Weight of the hidden-state sum of each pair."""
        return self.distill_ratio * self.hidden_coeff / max(1, len(self.hidden_pairs))

    @property
    def num_sums(self) -> int:
        """Rows of the sums of a training step: final layer, lens pairs, hidden-state pairs."""
        return 1 + len(self.lens_pairs) + len(self.hidden_pairs)

    def terms(
        self,
        student: Rows,
        teacher: Rows | None,
        targets_N: Tensor,
        scale: float,
        lens_shares: Sequence[float] | None = None,
    ) -> list[Term]:
        """Builds the fused terms: the final layer first, then the pairs of the lens.

        Args:
            student: Rows of the student.
            teacher: Rows of the teacher; None: cross entropy only.
            targets_N: Token ids that the rows predict (int64).
            scale: Factor of the whole loss.
            lens_shares: Factor of each pair of the lens, see `schedule.lens_shares`; None: 1.
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
        if teacher is None or not self.lens_pairs:
            return [final]
        shares = lens_shares if lens_shares is not None else [1.0] * len(self.lens_pairs)
        lens = [
            Term(
                student_hidden_ND=student_hidden_ND,
                teacher_hidden_NE=teacher_hidden_NE,
                kind=self.lens_divergence,
                options=self.lens_options,
                divergence_weight=scale * share * weight,
                train_head=self.train_head,
            )
            for student_hidden_ND, teacher_hidden_NE, weight, share in zip(
                student.layers, teacher.layers, self.lens_weights, shares, strict=True
            )
        ]
        return [final, *lens]

    def scheduled(self, sums_K2: Tensor, lens_shares: Sequence[float]) -> Tensor:
        """Returns sums of one step with each lens pair's share as a factor."""
        factors = torch.ones(self.num_sums)
        factors[1 : 1 + len(self.lens_pairs)] = torch.tensor(lens_shares)
        return factors.to(sums_K2.device, non_blocking=True)[:, None] * sums_K2

    def lens_coefficients(self, lens_shares: Sequence[float]) -> dict[str, float]:
        """Names λ as a schedule has made it: the mean over the pairs, and by pair if they differ.

        Without ``lens.weights``, which come on top; empty where λ is constant.
        """
        if not self.lens_pairs or self.lens_schedule == "constant":
            return {}
        mean = sum(lens_shares) / len(lens_shares)
        coefficients = {"lens_coeff": self.lens_coeff * mean}
        if self.lens_schedule in BY_DEPTH:
            for pair, share in zip(self.lens_pairs, lens_shares, strict=True):
                name = f"lens_coeff/{self.lens_schedule}/L{pair.student:02d}"
                coefficients[name] = self.lens_coeff * share
        return coefficients

    def losses(
        self,
        sums_K2: Sequence[Sequence[float]],
        num_tokens: float,
        scheduled_K2: Sequence[Sequence[float]] | None = None,
    ) -> dict[str, float]:
        """Names the means over tokens: ``loss``, its parts, lens and hidden states by layer.

        Args:
            sums_K2: Unweighted sums of cross entropy and divergence of each term in nats; of each
                hidden-state pair 0 and the distance.
            num_tokens: Response tokens in those sums.
            scheduled_K2: The same sums, each step's as `scheduled` makes them, so that ``loss`` is
                what those steps really trained; None: all shares were always 1.
        """
        tokens = max(num_tokens, 1)
        losses = {"loss": 0.0, "loss/ce": sums_K2[0][0] / tokens}
        losses["loss"] = (1 - self.distill_ratio) * losses["loss/ce"]
        if self.needs_teacher:
            losses["loss/kd"] = sums_K2[0][1] / tokens
            losses["loss"] += self.kd_weight * losses["loss/kd"]
        if self.lens_pairs:
            end = 1 + len(self.lens_pairs)
            values = [pair_sums[1] / tokens for pair_sums in sums_K2[1:end]]
            losses["loss/lens"] = self._lens_mean(values)
            trained = losses["loss/lens"]
            if scheduled_K2 is not None:
                trained = self._lens_mean([sums[1] / tokens for sums in scheduled_K2[1:end]])
            losses["loss"] += self.distill_ratio * self.lens_coeff * trained
            for pair, value in zip(self.lens_pairs, values, strict=True):
                losses[f"lens/{self.lens_divergence}/L{pair.student:02d}"] = value
        if self.hidden_pairs:
            hidden_sums = sums_K2[1 + len(self.lens_pairs) :]
            values = [pair_sums[1] / tokens for pair_sums in hidden_sums]
            losses["loss/hidden"] = sum(values) / len(values)
            losses["loss"] += self.distill_ratio * self.hidden_coeff * losses["loss/hidden"]
            for pair, value in zip(self.hidden_pairs, values, strict=True):
                losses[f"hidden/{self.hidden_loss}/L{pair.student:02d}"] = value
        return losses

    def _lens_mean(self, values: Sequence[float]) -> float:
        """Returns the weighted mean over the pairs."""
        return sum(w * v for w, v in zip(self.pair_weights, values, strict=True)) / len(values)


def _pair_weights(lens: LensConfig, pairs: Sequence[LayerPair]) -> list[float]:
    """Returns one weight per pair, scaled to a mean of 1: as listed, or by the student's depth."""
    count, weights = len(pairs), lens.weights
    depths = [float(pair.student) for pair in pairs]
    if lens.depth_weights == "deeper" and pairs:
        weights = depths
    elif lens.depth_weights == "shallower" and pairs:  # the same span of weights, mirrored
        weights = [min(depths) + max(depths) - depth for depth in depths]
    if weights is None or count == 0:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(
            f"objective.lens.weights has {len(weights)} entries {list(weights)}, but there are "
            f"{count} pairs"
        )
    total = sum(weights)
    if min(weights) < 0 or not total > 0:
        raise ConfigError(f"objective.lens.weights={list(weights)} must be ≥ 0 and not all 0")
    return [weight * count / total for weight in weights]
