"""Trains by several command lines, one after the other, and tells where the teacher's weights are.

Started by torchrun from test_sizes.py: ``sizes_worker.py JOBS.json``, a list of the arguments of
train.py. Starting Python takes seconds, so one start does all. Each process writes beside it a list
of objects with ``code`` (of the exit) and ``teacher`` (bytes that it holds of a divided teacher's
body and head after the training; of a whole one: null).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from distilllens.families import find_parts
from distilllens.runtime import distributed
from distilllens.teacher.sharding import divide_body
from distilllens.training import setup
from train import main

divided: list[nn.Module] = []


def held_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters in this process: its parts, and what is whole."""
    tensors = [p.data for p in module.parameters()]
    tensors += [p.ds_tensor for p in module.parameters() if hasattr(p, "ds_tensor")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def divide_and_tell(model: nn.Module, device: torch.device, **options: Any) -> Any:
    divided.append(model)
    return divide_body(model, device, **options)


def do(arguments: list[str]) -> dict[str, Any]:
    divided.clear()
    code, teacher = main(arguments), None
    if divided:
        parts = find_parts(divided[0])
        teacher = {"body": held_bytes(parts.body), "head": held_bytes(parts.head)}
    return {"code": code, "teacher": teacher}


if __name__ == "__main__":
    jobs_file = Path(sys.argv[1])
    # float16 on a CPU is slow, which is why DeepSpeed refuses it, but right.
    type(get_accelerator()).is_fp16_supported = lambda _: True
    setup.divide_body = divide_and_tell
    leave, distributed.shutdown = distributed.shutdown, lambda: None  # one group for all jobs
    outcomes = [do(job) for job in json.loads(jobs_file.read_text())]
    jobs_file.with_name(f"outcomes-{distributed.rank()}.json").write_text(json.dumps(outcomes))
    leave()
