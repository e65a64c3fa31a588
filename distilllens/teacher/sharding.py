"""A teacher in parts: each process holds a share of its body, gathered block by block (ZeRO-3).

The head stays whole on each device, as the loss reads its weight; so do the final norm and an
embedding tied to the head, which are used outside the body's own forward pass.

The weights are loaded first and divided then, parameter by parameter. Loaded in the dtype of its
files a model takes no memory of its own: its weights are the mapped files, shared by all processes
of a machine. A Llama of 713 MB in bfloat16, two processes on a CPU: 4 MB more in each after
loading, 400 MB in the end, half of the body and the head; loaded by transformers under
``deepspeed.zero.Init``, 421 and 620 MB. (While they are divided, the other processes than the first
write into their mapped pages on a CPU, 1.05 GB for a moment; a GPU gets its own copy of each.) In
another dtype than ``model.teacher_dtype`` each process makes a whole copy first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distilllens.families import ModelParts, find_parts

LARGEST_WHOLE = 10_000
"""Elements of a parameter that, once gathered, stays: norms and biases are cheaper kept."""
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def divide_body(model: nn.Module, device: torch.device, *, dtype: torch.dtype, on_cpu: bool) -> Any:
    """Divides the body of a frozen model over the processes; all of them must call it.

    From then on all processes must run the model together.

    Args:
        model: On the CPU, whole; changed in place.
        device: Of this process, where it computes.
        dtype: Of the weights.
        on_cpu: Keep the shares in the CPU's memory; else on the device.

    Returns:
        The engine that gathers; the model works as long as it is kept.
    """
    import deepspeed  # two seconds that --help need not pay

    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": LARGEST_WHOLE}
    if on_cpu:
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # it asks for one; nothing depends on it
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if dtype in PRECISIONS:
        settings[PRECISIONS[dtype]] = {"enabled": True}
    parts = find_parts(model)
    with _set_aside(parts):
        # Before the engine, which would put the whole model on the device first.
        deepspeed.zero.Init(module=parts.body, config_dict_or_path=settings)
        engine, *_ = deepspeed.initialize(model=parts.body, config=settings)
    model.to(device)  # what is whole, and buffers
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_tensor"):
            parameter.data = parameter.data.clone()  # on a CPU it would keep the files mapped
    return engine


def divided_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that `divide_body` divides; all others stay whole on each device."""
    parts = find_parts(model)
    with _set_aside(parts):
        return list(parts.body.parameters())


@contextmanager
def _set_aside(parts: ModelParts) -> Iterator[None]:
    """Takes out of the body the modules whose parameters stay whole, for a while."""
    outside = (parts.head, parts.final_norm, parts.project_out)
    whole = {id(parameter) for module in outside for parameter in module.parameters()}
    places = [
        (parent, name, child)
        for parent in parts.body.modules()
        for name, child in parent.named_children()
        if any(id(parameter) in whole for parameter in child.parameters(recurse=False))
    ]
    for parent, name, _ in places:
        setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
