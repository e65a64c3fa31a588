"""The only file that knows model families: where a causal LM keeps what the lens needs.

The parts are found by structure (the module list as long as ``num_hidden_layers``, a norm by name
beside it, the output embeddings) and what the family does to its logits by its configuration.
`distilllens.lens.LogitLens.self_check` proves the finding with numbers when a model is loaded, so a
family that this file does not know either works exactly or is refused with a clear error.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.utils import ModelOutput

from distilllens.errors import ConfigError
from distilllens.kernels.chunks import LogitTransform

FINAL_NORM_NAMES = (
    *("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm"),
    *("norm_f", "layer_norm", "embedding_norm"),  # MPT and Mamba; XGLM and BioGPT; LFM2
)
BODY_ARGUMENTS = ("input_ids", "position_ids", "use_cache")
"""What `run_body` calls a body with; all of transformers' own take them."""
DIVIDES_LOGITS = ("granite", "minicpm")
"""Families (prefix of model_type) that divide their logits by ``logits_scaling``; MiniCPM divides
what enters the head, which has no bias: the same."""
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
    body, blocks, parent = _find_blocks(base)
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
        head=_find_head(base),
        transform=_logit_transform(base),
        vocab_size=base.config.get_text_config().vocab_size,
    )


def _find_blocks(base: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """Returns the body, its list of blocks, and the module that holds the list."""
    family, count = base.config.model_type, base.config.get_text_config().num_hidden_layers
    decoder = base.get_decoder()  # the model itself where it knows of no part by that name
    lists = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    name = next((name for name, module in lists.items() if len(module) == count), None)
    if name is None:
        there = ", ".join(f"{name} ({len(module)})" for name, module in lists.items())
        raise ConfigError(
            f"no list of {count} transformer blocks in a model of family {family!r}",
            why="the lens reads the output of single blocks; lists (nn.ModuleList) in its "
            f"{type(decoder).__name__}: {there[:200] or 'none'}",
            fix="num_hidden_layers in config.json must be the length of the list of blocks",
        )
    parent = decoder.get_submodule(name.rpartition(".")[0])
    body = parent if decoder is base else decoder
    if body is base:
        raise ConfigError(
            f"family {family!r}: no body apart from the LM head",
            why=f"the blocks ({name}) stand in {type(base).__name__} itself, and the body must "
            "run without the head",
            fix="put all but the head into a module of its own, which base_model_prefix names",
        )
    taken = inspect.signature(body.forward).parameters.values()
    lacking = set(BODY_ARGUMENTS) - {argument.name for argument in taken}
    if lacking and all(argument.kind is not argument.VAR_KEYWORD for argument in taken):
        raise ConfigError(
            f"{type(body).__name__}.forward takes no {', '.join(sorted(lacking))}",
            why=f"the body of family {family!r} is run as those of transformers",
            fix="add the arguments",
        )
    return body, lists[name], parent


def _find_head(base: PreTrainedModel) -> nn.Linear:
    """Returns the LM head, which must be a linear layer with a row for each token."""
    family = base.config.model_type
    head = base.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"family {family!r}: no LM head",
            why=f"{type(base).__name__}.get_output_embeddings() returns None",
            fix="call the head lm_head, or let that method return it",
        )
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"family {family!r}: the LM head is {type(head).__name__}, not a linear layer",
            why="the loss is computed from the head's weight, a few hundred rows at a time",
            fix="choose a model whose get_output_embeddings() is an nn.Linear",
        )
    return head


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
    if softcap is None:  # RecurrentGemma's name for it
        softcap = getattr(config, "logits_soft_cap", None)
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

    Raises:
        ConfigError: The body returns something else than a body of transformers.
    """
    packed = position_ids_BT is not None
    with capture_blocks(parts, layers) as captured, _sequences_told(packed=packed):
        positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        output = parts.body(input_ids=input_ids_BT, use_cache=False, **positions)
    if not isinstance(output, ModelOutput) or "last_hidden_state" not in output:
        raise ConfigError(
            f"{type(parts.body).__name__} returns {type(output).__name__}, no last_hidden_state",
            why="bodies are run as those of transformers",
            fix="return a BaseModelOutput",
        )
    return output["last_hidden_state"], captured


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


def freeze_unreached_(model: nn.Module, parts: ModelParts) -> None:
    """Freezes what no loss on text reaches: the picture half of a model of texts and pictures.

    Its gradients would be 0, and weight decay would shrink it step by step.
    """
    reached = {id(p) for part in (parts.body, parts.head) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


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
