"""A smaller student out of a teacher's own blocks, as the command ``make-student`` cuts it.

Embeddings, final norm and LM head are the teacher's. Keep its first and last block: without them
the new model starts far worse (negative log-likelihood 23 instead of 15 for SmolLM2-135M).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from distilllens.errors import ConfigError
from distilllens.families import find_parts
from distilllens.models import load_model, load_tokenizer, num_blocks


def build_student(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Builds a model of the teacher's family from some of its blocks.

    Args:
        teacher: A causal language model; not changed.
        layers: Increasing numbers of its blocks, counted from 1; block j of the result is a copy
            of block ``layers[j - 1]``.

    Returns:
        The model in evaluation mode, on the CPU, in the teacher's dtype.

    Raises:
        ConfigError: Numbers out of range, doubled or not increasing.
    """
    depth = num_blocks(teacher.config)
    check_layers(layers, depth)
    blocks = find_parts(teacher).blocks
    prefix = next(name for name, module in teacher.named_modules() if module is blocks)
    with torch.random.fork_rng(devices=[]):
        student = AutoModelForCausalLM.from_config(
            _cut_config(teacher.config, layers), dtype=teacher.dtype
        )
    assert isinstance(student, PreTrainedModel)
    student.load_state_dict(_renumber(teacher.state_dict(), f"{prefix}.", layers))
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Refuses block numbers outside [1, depth], doubled or out of order.

    Raises:
        ConfigError: With the offending numbers.
    """
    outside = [i for i in layers if not 1 <= i <= depth]
    if outside or not layers:
        raise ConfigError(
            f"--layers: {outside or 'none'} given, the teacher has blocks 1 to {depth}",
            fix="numbers count the blocks from 1, as the lens layers do",
        )
    if sorted(set(layers)) != list(layers):
        raise ConfigError(f"--layers {list(layers)} must increase")


def _cut_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Returns the configuration of the smaller model; lists with one entry a block are cut too."""
    if config.get_text_config() is not config:
        raise ConfigError(f"{config.model_type} is no plain language model")
    cut = copy.deepcopy(config)
    depth = num_blocks(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(cut, name, [value[i - 1] for i in layers])
    cut.num_hidden_layers = len(layers)
    return cut


def _renumber(state: Mapping[str, Tensor], prefix: str, layers: Sequence[int]) -> dict[str, Tensor]:
    """Returns the weights that stay, with the blocks' new numbers in their names."""
    new_number = {layer - 1: position for position, layer in enumerate(layers)}
    renumbered: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            if int(number) not in new_number:
                continue
            name = f"{prefix}{new_number[int(number)]}.{rest}"
        renumbered[name] = weight
    return renumbered


def write_student(teacher_path: str, layers: Sequence[int], out: Path) -> tuple[int, int]:
    """Writes the student's model folder, tokenizer included, whole or not at all.

    Args:
        teacher_path: Model folder (or hub name) of the teacher.
        layers: As `build_student`.
        out: A folder that is not there yet.

    Returns:
        Numbers of parameters of teacher and student.

    Raises:
        ConfigError: ``out`` is there already; as `build_student` and `load_model`.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already", fix="choose another --out, or delete it")
    tokenizer = load_tokenizer(teacher_path, option="--teacher")
    teacher = load_model(teacher_path)
    student = build_student(teacher, layers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / out.name
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.rename(out)
    return _num_parameters(teacher), _num_parameters(student)


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
