"""What a run will do, told before it starts: `--dry_run`, the first lines, room on the disk."""

from __future__ import annotations

import shutil

from numerize.numerize import numerize
from rich.console import Console, RenderableType

from distilllens.config import TrainConfig
from distilllens.data.collate import collate
from distilllens.data.tokenize import PreparedData, record_lengths, response_rows
from distilllens.errors import StorageError
from distilllens.models import num_blocks
from distilllens.runs import RunFolder, newest_state
from distilllens.runtime import distributed
from distilllens.training.layer_choice import pair_tables
from distilllens.training.memory import (
    count_parameters,
    estimate_memory,
    estimate_state_bytes,
    longest_batch,
)
from distilllens.training.memory_tables import memory_figure, memory_report
from distilllens.training.setup import Plan, StepCount, count_steps, load_data, plan_run


def dry_run(config: TrainConfig) -> None:
    """Checks everything that can be checked without weights, and tells what would happen."""
    if not distributed.is_main():
        return
    console = Console(markup=False)  # brackets in a folder's name are no markup
    plan = plan_run(config)
    world_size = distributed.environment_world_size()
    data = load_data(plan)
    steps = count_steps(config, len(data.train), world_size)
    for content in describe_plan(plan, data, steps):
        console.print(content)
    sample = data.train[0]
    records = list(data.train.select(range(config.optim.micro_batch_size)))
    batch = collate(records, pad_id=plan.tokenizer.eos_token_id)
    size, length = batch.input_ids_BT.shape
    console.print(
        f"first micro-batch: {size} records padded to {length} tokens, "
        f"{batch.num_tokens} response tokens"
    )
    console.rule("first record")
    console.print(plan.tokenizer.decode(sample["prompt_ids"]), markup=False, highlight=False)
    console.print(plan.tokenizer.decode(sample["response_ids"]), markup=False, highlight=False)
    lengths, rows = record_lengths(data.train).tolist(), response_rows(data.train).tolist()
    for content in memory_report(plan, world_size, lengths, rows):
        console.print(content)
    console.print("dry run: nothing was trained")


def describe_plan(plan: Plan, data: PreparedData, steps: StepCount) -> list[RenderableType]:
    """Returns what a user wants to see before a run starts: models, layer pairs, data, length."""
    config = plan.config
    lines: list[RenderableType] = [
        f"student {config.model.student} ({numerize(count_parameters(plan.student_config))} "
        f"parameters, {num_blocks(plan.student_config)} blocks, {plan.dtype})"
    ]
    if plan.teacher_config is not None:
        lines.append(
            f"teacher {config.model.teacher} "
            f"({numerize(count_parameters(plan.teacher_config))} parameters, "
            f"{num_blocks(plan.teacher_config)} blocks, {plan.teacher_dtype})"
            + (f", rows read from {cache}" if (cache := config.model.teacher_cache) else "")
        )
    lines += plan.notes
    lines += pair_tables(plan)
    lines.append(data.summary())
    lines.append(
        f"{config.objective.approach}: {steps.total_steps:,} steps of {steps.global_batch} "
        f"records, {steps.steps_per_epoch:,} steps an epoch, ZeRO stage {plan.zero_stage}"
    )
    return lines


def check_room(plan: Plan, data: PreparedData, folder: RunFolder) -> list[str]:
    """Estimates a run's memory and disk; returns a line about each.

    Raises:
        StorageError: There is no room on the disk for the first save.
    """
    world_size = distributed.world_size()
    lengths, rows = record_lengths(data.train).tolist(), response_rows(data.train).tolist()
    try:
        estimate = estimate_memory(plan, world_size, batch=longest_batch(plan, lengths, rows))
        state, model = estimate_state_bytes(plan)
    except (RuntimeError, NotImplementedError) as error:  # a family whose code reads its numbers
        reason = str(error).partition("\n")[0]
        return [f"memory and disk: no estimate, the models do not run without numbers ({reason})"]
    beside = sum(estimate.host.values())
    memory = f"memory: about {memory_figure(estimate.total)} per process" + (
        f", and {memory_figure(beside)} beside its GPU" if beside else ""
    )
    return [
        f"{memory} (estimate; --dry_run tells for what)",
        _check_space(plan, folder, state, model),
    ]


def _check_space(plan: Plan, folder: RunFolder, state: int, model: int) -> str:
    """Compares the free space with what a run writes: states, latest/ and best/."""
    free = shutil.disk_usage(folder.root).free
    first, all_ = state + 2 * model, (plan.config.run.keep + 1) * state + 3 * model
    need = f"need about {first / 1e9:.2f} GB for the first save"
    if free < first and newest_state(folder) is None:
        raise StorageError(
            f"no space left for {folder.root}: {need}, free {free / 1e9:.2f} GB",
            fix="free some space, or choose another --run.output_dir",
        )
    line = f"disk: at most {all_ / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
    return line if free >= all_ else f"warning: {line}; a full disk ends the run at a save"
