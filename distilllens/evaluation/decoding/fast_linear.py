"""Linear layers of a model by oneDNN while it generates, in float32 on a CPU.

PyTorch gives float32 products to MKL, which on AMD's processors takes up to twice as long (see
`products`). Everywhere else this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distilllens.kernels.products import is_onednns, onednn_linear


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Runs the model's linear layers by oneDNN, without gradients; hooks and weights stay.

    Only layers of exactly these classes: adapters and quantised layers go their own way.
    """
    changed: list[nn.Module] = []
    for module in model.modules():
        forward = FORWARDS.get(type(module))
        if forward is None or "forward" in vars(module):
            continue
        if is_onednns(module.get_parameter("weight")):
            vars(module)["forward"] = partial(forward, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _linear(module: Any, rows: Tensor) -> Tensor:
    return onednn_linear(rows, module.weight, module.bias)


def _conv1d(module: Any, rows: Tensor) -> Tensor:
    """GPT-2's linear layer, which stores its weight the other way round."""
    return onednn_linear(rows, module.weight.T, module.bias)


FORWARDS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Linear: _linear,
    Conv1D: _conv1d,
}
