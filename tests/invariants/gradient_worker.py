"""Does one training step for each of several command lines and saves the gradients they made.

Started by torchrun from test_global_batch.py: ``gradient_worker.py JOBS.json``, a list of
``[file to write, arguments of train.py]``. Starting Python takes seconds, so one start does all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from distilllens.config import load_config
from distilllens.runs import create_run_folder
from distilllens.runtime import distributed
from distilllens.session import build_trainer
from distilllens.trainer import Trainer


def full_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns all whole gradients in float32, the student's by its own names; all processes must
    call it."""
    from deepspeed.utils import safe_get_full_grad

    gradients = {}
    for full_name, parameter in trainer.module.named_parameters():
        name = full_name.removeprefix("student.")
        whole = trainer.plan.zero_stage == 0
        gradient = parameter.grad if whole else safe_get_full_grad(parameter)
        assert gradient is not None, name
        gradients[name] = gradient.detach().float().clone()
    return gradients


def one_step_gradients(argv: list[str]) -> dict[str, torch.Tensor]:
    """Builds the trainer of a command line and returns the gradient of its first step."""
    config = load_config(argv)
    device = distributed.initialize()
    folder = create_run_folder(config.run.output_dir)
    with build_trainer(config, folder, device, argv) as trainer:
        captured: dict[str, torch.Tensor] = {}
        engine_step = trainer.engine.step

        def step() -> None:
            if trainer.engine.is_gradient_accumulation_boundary():
                captured.update(full_gradients(trainer))
            engine_step()

        trainer.engine.step = step
        trainer.train_step(next(trainer.epoch()))
    return captured


if __name__ == "__main__":
    for out, arguments in json.loads(Path(sys.argv[1]).read_text()):
        gradients = one_step_gradients(arguments)
        if distributed.is_main():
            save_file(gradients, Path(out))
    distributed.shutdown()
