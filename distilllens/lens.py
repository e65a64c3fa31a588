"""The logit lens: what a model would say if it stopped after some block.

``lens = head ∘ final_norm`` with the model's own modules (nostalgebraist 2020; tuned-lens's
``Unembed``). A lens is for raw block outputs; the last of ``hidden_states`` is normed already.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from distilllens.errors import ConfigError
from distilllens.families import FINAL_NORM_NAMES, base_model, find_parts, run_body
from distilllens.kernels.chunks import Unembedding

SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference relative to the largest logit; 16-bit models get 0.05."""


class LogitLens:
    """Final norm and LM head of one model, applied to the output of any block.

    Args:
        model: A Hugging Face causal LM, with or without LoRA.
        norm: ``final``: the model's own final norm comes first; ``none``: as in the published
            code, the head alone.

    Raises:
        ConfigError: The model's parts cannot be found.
    """

    def __init__(self, model: nn.Module, norm: Literal["final", "none"] = "final") -> None:
        if norm not in ("final", "none"):
            raise ConfigError(f"lens.norm={norm!r} must be 'final' or 'none'")
        self.model, self.norm = model, norm
        self.parts = find_parts(model)

    def normalize(self, hidden: Tensor) -> Tensor:
        """Maps raw block output [..., D] to what the head takes, [..., D]; differentiable."""
        if self.norm == "final":
            hidden = self.parts.final_norm(hidden)
        return self.parts.project_out(hidden)

    def unembedding(self) -> Unembedding:
        """Returns the head's weight, bias and logit transform, for `distilllens.fused`."""
        head = self.parts.head
        return Unembedding(head_VD=head.weight, bias_V=head.bias, transform=self.parts.transform)

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps raw block output [..., D] to logits [..., V] in the model's dtype."""
        return self.head_logits(self.normalize(hidden))

    def head_logits(self, final: Tensor) -> Tensor:
        """Maps what enters the head, [..., D], to logits [..., V] in the model's dtype."""
        logits = self.parts.head(final)
        return logits if self.parts.transform is None else self.parts.transform(logits)

    @torch.no_grad()
    def self_check(self, input_ids_BT: Tensor) -> float:
        """Proves that the parts were found: last block through the lens = the model's own logits.

        Args:
            input_ids_BT: A few token ids (int64), no padding.

        Returns:
            The largest difference, relative to the largest logit.

        Raises:
            ConfigError: They differ, so the lens would show something else than the model. (With
                ``norm="none"`` the check is made with the norm.)
        """
        model, parts = base_model(self.model), self.parts
        family, was_training = model.config.model_type, model.training
        lens = LogitLens(self.model, "final")
        lens.parts = parts
        entered: list[Tensor] = []
        hook = parts.head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        model.eval()
        try:
            expected = model(input_ids=input_ids_BT, use_cache=False).logits
            hook.remove()
            last = len(parts.blocks)
            final_BTD, captured = run_body(parts, input_ids_BT, [last])
            error = max(
                _difference(lens.logits(captured[last]), expected),
                # What enters the head in a step of training.
                _difference(lens.head_logits(final_BTD), expected),
            )
            if not expected.isfinite().all():
                raise ConfigError(
                    f"a model of family {family!r} gives logits that are not finite",
                    why="its weights hold NaN or infinities, or overflow in this dtype",
                )
            if error > self._tolerance():
                raise ConfigError(
                    f"the logit lens of family {family!r} differs from the model's own logits "
                    f"by {error:.2g} of the largest one",
                    why=lens._explain(entered, final_BTD, captured[last]),
                    fix="teach distilllens/families.py this family",
                )
        finally:
            hook.remove()
            model.train(was_training)
        return error

    def _explain(self, entered: list[Tensor], final_BTD: Tensor, last_BTD: Tensor) -> str:
        """Returns where the way from the last block to the logits is another than the lens's."""
        parts, tolerance = self.parts, self._tolerance()
        norm = f"final norm {type(parts.final_norm).__name__}"
        if isinstance(parts.final_norm, nn.Identity):
            norm += f" (no {', '.join(FINAL_NORM_NAMES)} beside the blocks)"
        head = f"head {type(parts.head).__name__}"
        if not entered:
            return f"the model does not call its {head}; {norm}"
        if not _difference(self.normalize(last_BTD), entered[-1]) <= tolerance:
            return f"what enters the {head} is not the last block's output behind the {norm}"
        if not _difference(final_BTD, entered[-1]) <= tolerance:
            body = type(parts.body).__name__
            return f"what enters the {head} is not the last_hidden_state of {body}; {norm}"
        return f"behind the {head} stands something else than {parts.transform}; {norm}"

    @torch.no_grad()
    def packing_check(self, input_ids_BT: Tensor) -> float:
        """Proves that records packed into one row do not see each other.

        Args:
            input_ids_BT: A few token ids of one record (int64).

        Returns:
            The largest difference between the record's last hidden states alone and packed behind
            another one, relative to the largest.

        Raises:
            ConfigError: They differ: this model's attention does not go by the position ids.
        """
        model = base_model(self.model)
        was_training = model.training
        model.eval()
        try:
            alone_BTD, _ = run_body(self.parts, input_ids_BT)
            positions_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)[None]
            packed_BTD, _ = run_body(
                self.parts,
                torch.cat([input_ids_BT.flip(1), input_ids_BT], dim=1),
                position_ids_BT=torch.cat([positions_BT, positions_BT], dim=1),
            )
        finally:
            model.train(was_training)
        second_BTD = packed_BTD[:, input_ids_BT.shape[1] :].double()
        error = ((second_BTD - alone_BTD).abs().max() / alone_BTD.abs().max()).item()
        if not error <= self._tolerance():
            raise ConfigError(
                f"data.packing: attention of family {model.config.model_type!r} with "
                f"{model.config._attn_implementation!r} crosses the records of a row",
                why=f"hidden states of a record differ by {error:.2g} behind another one",
                fix="--data.packing false, or another --model.attention",
            )
        return error

    def _tolerance(self) -> float:
        dtype = next(base_model(self.model).parameters()).dtype
        return SELF_CHECK_TOLERANCE.get(dtype, 0.05)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest of ``expected``; infinite for NaN."""
    if actual.shape != expected.shape:
        return math.inf
    largest = expected.double().abs().max().clamp(min=1e-6)
    error = ((actual.double() - expected.double()).abs().max() / largest).item()
    return math.inf if math.isnan(error) else error
