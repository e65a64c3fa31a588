"""How much memory and disk a run will need, before it starts: estimates from shapes alone."""

from __future__ import annotations

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from distilllens.chunks import default_chunk_rows
from distilllens.setup import Plan

GIGA = 1e9
ADAM_BYTES = 8
"""Two float32 moments per trainable parameter."""
BLOCK_ACTIVATIONS = 17
"""Values kept per token, block and unit of width for the backward pass (Korthikanti et al. 2022:
34 bytes at 16 bits, attention scores left out, as fused attention does)."""


def estimate_memory(plan: Plan, world_size: int) -> dict[str, float]:
    """Returns GB (1e9 bytes) per process by purpose, for the longest possible micro-batch.

    Args:
        plan: Of the run.
        world_size: Number of processes.
    """
    stage = plan.zero_stage
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = {kind: world_size if stage >= level else 1 for kind, level in ZERO_LEVELS.items()}
    size = torch.finfo(plan.dtype).bits // 8
    student = count_parameters(plan.student_config)
    projectors = _projector_parameters(plan)
    trainable = _trainable(plan, student) + projectors
    text = plan.student_config.get_text_config()
    master_bytes = 4 if stage > 0 or plan.dtype != torch.float32 else 0
    estimate = {
        "student weights": student * size / shards["weights"],
        "gradients": trainable * size / shards["gradients"],
        "optimizer": trainable * (ADAM_BYTES + master_bytes) / shards["optimizer"],
        "activations": _activation_bytes(plan, size),
        "loss": 4.0
        * (
            2 * default_chunk_rows(plan.vocab_size, device) * plan.vocab_size
            + text.vocab_size * text.hidden_size
        ),
    }
    if projectors:
        estimate["projectors"] = projectors * size / shards["weights"]
    if plan.teacher_config is not None:
        teacher_size = torch.finfo(plan.teacher_dtype).bits // 8
        if plan.config.model.teacher_cache is None:
            estimate["teacher weights"] = count_parameters(plan.teacher_config) * teacher_size
        else:
            teacher = plan.teacher_config.get_text_config()
            estimate["teacher head"] = teacher.vocab_size * teacher.hidden_size * teacher_size
    return {name: value / GIGA for name, value in estimate.items()}


def estimate_state_bytes(plan: Plan) -> tuple[int, int]:
    """Returns the bytes on disk of a saved training state, and of an exported model.

    A state holds the model twice, as DeepSpeed's weights and as a Hugging Face folder, and the
    optimizer's moments and float32 weights.
    """
    student = count_parameters(plan.student_config)
    model = student * (torch.finfo(plan.dtype).bits // 8)
    masters = 4 if plan.zero_stage > 0 or plan.dtype != torch.float32 else 0
    return 2 * model + _trainable(plan, student) * (ADAM_BYTES + masters), model


ZERO_LEVELS = {"optimizer": 1, "gradients": 2, "weights": 3}
"""The ZeRO stage from which each is divided over the processes."""


def count_parameters(config: PretrainedConfig) -> int:
    """Returns the number of parameters of a model, without allocating it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _trainable(plan: Plan, student_parameters: int) -> int:
    lora = plan.config.model.student_lora
    if lora is None:
        return student_parameters
    text = plan.student_config.get_text_config()
    # Seven adapted matrices per block of about width × width, each with r · (in + out) parameters.
    return text.num_hidden_layers * 7 * lora.r * 2 * text.hidden_size


def _projector_parameters(plan: Plan) -> int:
    """Returns the number of weights that compare hidden states: one matrix a pair."""
    if plan.teacher_config is None:
        return 0
    student, teacher = plan.student_config.get_text_config(), plan.teacher_config.get_text_config()
    return len(plan.objective.hidden_pairs) * int(student.hidden_size * teacher.hidden_size)


def _activation_bytes(plan: Plan, size: int) -> float:
    text, config = plan.student_config.get_text_config(), plan.config
    tokens = config.optim.micro_batch_size * config.data.max_length
    per_block = tokens * text.hidden_size * size
    if config.model.gradient_checkpointing:
        return per_block * (text.num_hidden_layers + BLOCK_ACTIVATIONS)
    return per_block * BLOCK_ACTIVATIONS * text.num_hidden_layers


def memory_table(estimate: dict[str, float]) -> Table:
    """Returns the estimate for the screen."""
    table = Table(title="memory per process, estimate for the longest batch")
    table.add_column("for")
    table.add_column("GB", justify="right")
    for name, gigabytes in estimate.items():
        table.add_row(name, f"{gigabytes:.2f}")
    table.add_row("total", f"{sum(estimate.values()):.2f}", style="bold")
    return table
