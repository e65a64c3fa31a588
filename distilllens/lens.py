"""The logit lens: what a model would say if it stopped after some block.

``lens = head ∘ final_norm`` with the model's own modules (nostalgebraist 2020; tuned-lens's
``Unembed``). A lens is for raw block outputs; the last of ``hidden_states`` is normed already.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distilllens.errors import ConfigError
from distilllens.families import (
    FINAL_NORM_NAMES,
    ModelParts,
    base_model,
    capture_blocks,
    find_parts,
    run_body,
)
from distilllens.kernels.chunks import Unembedding

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference relative to the largest number."""
ROUGH_TOLERANCE = 0.05
"""The same in 16 bits, of which one rounding of the largest number is 0.004."""


@dataclass(frozen=True)
class _OwnRun:
    """What a model's own forward pass gives."""

    last_BTD: Tensor
    """The last block's output."""
    entered_BTD: Tensor | None
    """What entered the head; None: it was not called."""
    logits_BTV: Tensor


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
        logits = self.parts.head(final.to(self.parts.head.weight.dtype))  # Mamba's are float32
        return logits if self.parts.transform is None else self.parts.transform(logits)

    @torch.no_grad()
    def self_check(self, input_ids_BT: Tensor) -> float:
        """Proves that the parts were found: last block through the lens = the model's own logits.

        In 16 bits the roundings would hide a wrong function of the logits, as a soft cap that they
        hardly reach. So the model then runs once more with all behind its last block in float32,
        for which the head is copied (4 bytes a weight) and let go again.

        Args:
            input_ids_BT: A few token ids (int64), no padding.

        Returns:
            The largest difference, relative to the largest logit; of a model in 16 bits with all
            behind its last block in float32.

        Raises:
            ConfigError: They differ, so the lens would show something else than the model. (With
                ``norm="none"`` the check is made with the norm.)
        """
        model, lens = base_model(self.model), LogitLens(self.model, "final")
        lens.parts = self.parts
        was_training = model.training
        model.eval()
        try:
            error = lens._compare(input_ids_BT, self._tolerance())
            if self._tolerance() == ROUGH_TOLERANCE:
                with _in_float32_behind_the_blocks(self.parts):
                    error = lens._compare_in_float32(input_ids_BT)
        finally:
            model.train(was_training)
        return error

    def _compare(self, input_ids_BT: Tensor, tolerance: float) -> float:
        """Returns the error of the lens, and of the way that a step of training goes."""
        own = self._run_model(input_ids_BT)
        final_BTD, captured = run_body(self.parts, input_ids_BT, [len(self.parts.blocks)])
        (last_BTD,) = captured.values()
        error = max(
            _difference(self.logits(last_BTD), own.logits_BTV),
            # What enters the head in a step of training.
            _difference(self.head_logits(final_BTD), own.logits_BTV),
        )
        if not own.logits_BTV.isfinite().all():
            raise ConfigError(
                f"a model of family {self._family()!r} gives logits that are not finite",
                why="its weights hold NaN or infinities, or overflow in this dtype",
            )
        if error > tolerance:
            raise self._refusal(error, self._explain(own, final_BTD, last_BTD, tolerance))
        return error

    def _compare_in_float32(self, input_ids_BT: Tensor) -> float:
        """Returns the error of the lens in one run of the model: 16-bit blocks may not repeat."""
        try:
            own = self._run_model(input_ids_BT)
            error = _difference(self.logits(own.last_BTD), own.logits_BTV)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as mixed:  # 16 bits and float32 in one operation
            raise ConfigError(
                f"the logit lens of family {self._family()!r} cannot be proved in 16 bits",
                why="behind the last block stands something that does not run in float32: "
                + str(mixed).partition("\n")[0],
                fix="--model.dtype float32 with a *_fp32.json of configs/deepspeed/ proves it",
            ) from None
        tolerance = TOLERANCE[torch.float32]
        if error > tolerance:
            raise self._refusal(error, self._explain(own, None, own.last_BTD, tolerance))
        return error

    def _run_model(self, input_ids_BT: Tensor) -> _OwnRun:
        """Runs the model as its authors meant it."""
        entered: list[Tensor] = []
        hook = self.parts.head.register_forward_pre_hook(
            lambda _, inputs: entered.append(inputs[0])
        )
        last = len(self.parts.blocks)
        try:
            with capture_blocks(self.parts, [last]) as captured:
                logits_BTV = base_model(self.model)(input_ids=input_ids_BT, use_cache=False).logits
        finally:
            hook.remove()
        return _OwnRun(captured[last], entered[-1] if entered else None, logits_BTV)

    def _family(self) -> str:
        return str(base_model(self.model).config.model_type)

    def _refusal(self, error: float, why: str) -> ConfigError:
        return ConfigError(
            f"the logit lens of family {self._family()!r} differs from the model's own logits "
            f"by {error:.2g} of the largest one",
            why=why,
            fix="teach distilllens/families.py this family",
        )

    def _explain(
        self, own: _OwnRun, final_BTD: Tensor | None, last_BTD: Tensor, tolerance: float
    ) -> str:
        """Returns where the way from the last block to the logits is another than the lens's."""
        parts = self.parts
        norm = f"final norm {type(parts.final_norm).__name__}"
        if isinstance(parts.final_norm, nn.Identity):
            norm += f" (no {', '.join(FINAL_NORM_NAMES)} beside the blocks)"
        head = f"head {type(parts.head).__name__}"
        if own.entered_BTD is None:
            return f"the model does not call its {head}; {norm}"
        if not _difference(self.normalize(last_BTD), own.entered_BTD) <= tolerance:
            return f"what enters the {head} is not the last block's output behind the {norm}"
        if final_BTD is not None and not _difference(final_BTD, own.entered_BTD) <= tolerance:
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
        return TOLERANCE.get(dtype, ROUGH_TOLERANCE)


@contextmanager
def _in_float32_behind_the_blocks(parts: ModelParts) -> Iterator[None]:
    """Has the last block's output, and norm, projection and head of 16 bits, in float32.

    An embedding that is tied to the head stays as it is.
    """

    def widen(_module: nn.Module, _inputs: object, output: Any) -> Any:
        return output.float() if isinstance(output, Tensor) else (output[0].float(), *output[1:])

    narrow = [
        (module, name, parameter)
        for part in (parts.final_norm, parts.project_out, parts.head)
        for module in part.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype in (torch.bfloat16, torch.float16)  # quantised ones are not
    ]
    hook = parts.blocks[-1].register_forward_hook(widen)
    try:
        for module, name, parameter in narrow:
            setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
        yield
    finally:
        hook.remove()
        for module, name, parameter in narrow:
            setattr(module, name, parameter)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest of ``expected``; infinite for NaN."""
    if actual.shape != expected.shape:
        return math.inf
    largest = expected.double().abs().max().clamp(min=1e-6)
    error = ((actual.double() - expected.double()).abs().max() / largest).item()
    return math.inf if math.isnan(error) else error
