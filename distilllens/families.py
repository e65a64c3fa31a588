"""The only file that knows model families: where a causal LM keeps what the lens needs.

The parts are found by structure (the module list as long as ``num_hidden_layers``, a norm by name
beside it, the output embeddings) and what the family does to its logits by its configuration.
`distilllens.lens.LogitLens.self_check` proves the finding with numbers when a model is loaded, so a
family that this file does not know either works exactly or is refused with a clear error.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from distilllens.chunks import LogitTransform
from distilllens.errors import ConfigError

FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")
DIVIDES_LOGITS = ("granite",)
"""Families (prefix of model_type) that divide their logits by ``logits_scaling``."""
MULTIPLIES_LOGITS = ("hyperclovax",)
"""Families that multiply them by it."""


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """A causal language model, taken apart; every field refers to the model's own modules."""

    body: nn.Module
    """Everything before the head; returns the normed last hidden state."""
    blocks: nn.ModuleList
    """The transformer blocks."""
    final_norm: nn.Module
    """Norm between the last block and the head; nn.Identity in a family without one."""
    project_out: nn.Module
    """Linear map between norm and head (OPT-350m); nn.Identity elsewhere."""
    head: nn.Linear
    """LM head: a linear layer with ``weight`` [V, D] and, in some families, ``bias`` [V]."""
    transform: LogitTransform | None
    """What happens to the logits after the head; None: nothing."""
    vocab_size: int
    """Rows of the head, padding included."""


def find_parts(model: nn.Module) -> ModelParts:
    """Finds the parts of a Hugging Face causal LM; LoRA wrappers are looked through.

    Raises:
        ConfigError: A part is missing; the message names it.
    """
    base = base_model(model)
    family = base.config.model_type
    count = base.config.get_text_config().num_hidden_layers
    body = base.get_decoder()
    found = [
        (name, module)
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise ConfigError(
            f"no list of {count} transformer blocks in a model of family {family!r}",
            why="the lens reads the output of single blocks",
        )
    name, blocks = found[0]
    parent = body.get_submodule(name.rpartition(".")[0])
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"family {family!r}: the LM head is {type(head).__name__}, not a linear layer"
        )
    norms = [
        getattr(parent, n)
        for n in FINAL_NORM_NAMES
        if isinstance(getattr(parent, n, None), nn.Module)
    ]
    project_out = getattr(parent, "project_out", None)
    return ModelParts(
        body=body,
        blocks=blocks,
        final_norm=norms[0] if norms else nn.Identity(),
        project_out=project_out if isinstance(project_out, nn.Module) else nn.Identity(),
        head=head,
        transform=_logit_transform(base),
        vocab_size=base.config.get_text_config().vocab_size,
    )


def base_model(model: nn.Module) -> PreTrainedModel:
    """Returns the Hugging Face model inside a LoRA wrapper, or the model itself."""
    unwrapped = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(unwrapped, PreTrainedModel)
    return unwrapped


def _logit_transform(model: PreTrainedModel) -> LogitTransform | None:
    config = model.config.get_text_config()
    scale = 1.0
    if logit_scale := getattr(config, "logit_scale", None):
        scale = float(logit_scale)
    if logits_scaling := getattr(config, "logits_scaling", None):
        if config.model_type.startswith(DIVIDES_LOGITS):
            scale = 1.0 / float(logits_scaling)
        elif config.model_type.startswith(MULTIPLIES_LOGITS):
            scale = float(logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    if scale == 1.0 and softcap is None:
        return None
    return LogitTransform(scale=scale, softcap=None if softcap is None else float(softcap))


@contextmanager
def capture_blocks(parts: ModelParts, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the raw outputs of some blocks while the body runs.

    Args:
        parts: Of the model that will run.
        layers: Block numbers counted from 1, so that i is the paper's ``hidden_states[i]``.

    Yields:
        A dictionary that fills with ``hidden_BTD`` by layer. The tensors stay in the graph, also
        under gradient checkpointing: the hook stores the block's own output and computes nothing.
    """
    captured: dict[int, Tensor] = {}

    def store(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        captured[layer] = output if isinstance(output, Tensor) else output[0]

    handles = [
        parts.blocks[i - 1].register_forward_hook(
            lambda _module, _inputs, output, layer=i: store(layer, output)
        )
        for i in sorted(set(layers))
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def run_body(
    parts: ModelParts,
    input_ids_BT: Tensor,
    layers: Collection[int] = (),
    position_ids_BT: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Runs a model without its head.

    Padding is on the right and attention is causal, so real tokens see no padding and no mask is
    passed: that keeps the fast causal kernels, and position ids are 0, 1, 2 … by default.

    Args:
        parts: Of the model.
        input_ids_BT: Token ids (int64), padded on the right.
        layers: Blocks whose raw output is wanted, counted from 1.
        position_ids_BT: Only for records packed into rows; where they do not go on by 1,
            transformers starts another sequence, and attention does not cross the border.

    Returns:
        ``final_BTD``, which enters the head, and ``hidden_BTD`` by layer, not normed.
    """
    packed = position_ids_BT is not None
    with capture_blocks(parts, layers) as captured, _sequences_told(packed=packed):
        positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        output = parts.body(input_ids=input_ids_BT, use_cache=False, **positions)
    return output.last_hidden_state, captured


@contextmanager
def _sequences_told(*, packed: bool) -> Iterator[None]:
    """Tells transformers whether rows hold several records.

    It would look for jumps in the position ids, also in its own 0, 1, 2 …, and read the answer
    back from the GPU: the host would wait once in each forward pass for all work queued before.
    """

    def sequences(position_ids: Tensor) -> Tensor | None:
        return (position_ids == 0).cumsum(-1) if packed else None

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = sequences
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def compile_blocks(parts: ModelParts) -> None:
    """Has torch.compile compile each block's computation, lengths kept dynamic.

    Blocks are alike, so one is compiled for all. Their ``forward`` is compiled and not the call,
    so that hooks and gradient checkpointing stay outside and work as without.
    """
    for block in parts.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def gather_rows(hidden_BTD: Tensor, rows_N: Tensor) -> Tensor:
    """Returns the rows ``rows_N`` (int64, into the flattened B·T positions) as [N, D]."""
    return hidden_BTD.flatten(0, 1).index_select(0, rows_N)


def no_decay_parameters(model: nn.Module) -> set[str]:
    """Returns the names of parameters that are not decayed: norms of every kind, and biases.

    Both are vectors in every family, while all that should be decayed is a matrix; so the rule is
    the number of dimensions, which no family's naming can escape.
    """
    return {name for name, parameter in model.named_parameters() if _dimensions(parameter) < 2}


def _dimensions(parameter: nn.Parameter) -> int:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the tensor itself
    return len(shape)


def parameter_count(model: nn.Module) -> int:
    """Returns the number of parameters, shared ones counted once."""
    return sum(torch.Size(getattr(p, "ds_shape", p.shape)).numel() for p in model.parameters())
