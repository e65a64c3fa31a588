"""A training step never makes the host wait for a number from the device.

On a GPU each such read empties the queue of kernels. They are the same operators on a CPU, where
nothing waits, so they can be caught here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Workspace
from torch.utils._python_dispatch import TorchDispatchMode

from distilllens.config import load_config
from distilllens.runs import create_run_folder
from distilllens.runtime import distributed
from distilllens.session import build_trainer

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
"""What `.item()` and `bool(tensor)` come down to, and operators whose result's size is a value."""


class NoHostReads(TorchDispatchMode):
    """Fails where a value goes from tensors to Python."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        assert name not in READS and not by_mask, f"{name} makes the host wait"
        return function(*args, **(kwargs or {}))


def test_the_watcher_sees_reads() -> None:
    numbers = torch.arange(3.0)
    reads: list[Callable[[], Any]] = [
        numbers.sum().item,
        lambda: bool(numbers.sum() > 0),
        lambda: numbers[numbers > 1],
    ]
    for read in reads:
        with pytest.raises(AssertionError, match="makes the host wait"), NoHostReads():
            read()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--objective.kd_ratio", "0.5"),
        ("--objective.divergence", "akl"),
        ("--objective.top_k", "8", "--objective.lens.top_k", "2"),
        ("--objective.hidden.coeff", "1", "--objective.lens.schedule", "ramp"),
        ("--objective.lens.schedule", "deepest_first"),
        ("--data.packing", "true"),
        ("--optim.micro_batch_size", "2", "--optim.accumulation", "3"),
    ],
    ids=" ".join,
)
def test_a_step_reads_nothing_back(workspace: Workspace, flags: tuple[str, ...]) -> None:
    arguments = workspace.flags("--deepspeed", workspace.deepspeed(0), *flags)
    config = load_config(arguments)
    device = distributed.initialize()
    folder = create_run_folder(config.run.output_dir)
    with build_trainer(config, folder, device, arguments) as trainer:
        batches = next(trainer.loader.epoch(0))
        # With ZeRO, DeepSpeed reads the gradient's norm in its own step, to clip; ours ends before.
        trainer.engine.step = lambda: None
        with NoHostReads():
            trainer.train_step(batches)
        assert trainer.guard.bad_step() is None
        assert trainer.totals.tokens == batches.num_tokens > 0
        assert trainer.totals.input_tokens == batches.num_input_tokens > batches.num_tokens
        assert trainer.totals.sums_K2[1:, 1].min() > 0
        assert trainer.norm_before_clipping > 0
