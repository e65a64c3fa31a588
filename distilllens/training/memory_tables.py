"""The estimate of a run's memory as tables for a screen of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import RenderableType
from rich.table import Table

from distilllens.training.memory import (
    BatchShape,
    MemoryEstimate,
    RunCounts,
    at_stage,
    count_run,
    estimate_memory,
    longest_batch,
    run_device,
)
from distilllens.training.setup import Plan


def memory_report(
    plan: Plan, world_size: int, lengths: Sequence[int], rows: Sequence[int]
) -> list[RenderableType]:
    """Returns what the longest batch of known records needs, and what in other ZeRO stages.

    Args:
        plan: Of the run.
        world_size: Number of processes.
        lengths: Tokens of each training record.
        rows: Response tokens of each.
    """
    batch, device = longest_batch(plan, lengths, rows), run_device()
    try:
        counts = count_run(plan, batch, device)
    except (RuntimeError, NotImplementedError) as error:  # a family whose code reads its numbers
        reason = str(error).partition("\n")[0]
        return [f"memory: no estimate, the models do not run without numbers ({reason})"]
    estimate = estimate_memory(plan, world_size, counts=counts, device=device)
    return [memory_table(estimate, batch), stages_table(plan, world_size, counts, device)]


def memory_table(estimate: MemoryEstimate, batch: BatchShape) -> Table:
    """Returns the estimate by purpose; two columns where there is a GPU."""
    table = Table(
        title=f"memory per process, estimate for {batch.records} records of {batch.length} tokens, "
        f"{batch.rows} of answers; most is needed at the {estimate.moment}"
    )
    columns = {"memory": estimate.device}
    if estimate.host:
        columns = {"GPU": estimate.device, "main memory": estimate.host}
    table.add_column("for")
    for head in columns:
        table.add_column(head, justify="right")
    for name in dict.fromkeys((*estimate.device, *estimate.host)):
        table.add_row(name, *(memory_figure(parts.get(name)) for parts in columns.values()))
    totals = (memory_figure(sum(parts.values())) for parts in columns.values())
    table.add_row("total", *totals, style="bold")
    return table


def stages_table(
    plan: Plan, world_size: int, counts: RunCounts, device: torch.device | None = None
) -> Table:
    """Returns what each ZeRO stage would need with the same options and processes."""
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    table = Table(
        "for",
        title=f"memory per process by ZeRO stage, {processes}; in brackets the logits' chunks of "
        "the loss where another moment needs more",
    )
    first = 0 if plan.dtype == torch.float32 else 1  # stage 0 is refused in other precisions
    columns: list[dict[str, str]] = []
    for stage in range(first, 4):
        is_own = stage == plan.zero_stage
        table.add_column(f"{stage}, this file" if is_own else str(stage), justify="right")
        estimate = estimate_memory(at_stage(plan, stage), world_size, counts=counts, device=device)
        columns.append(_stage_figures(estimate, counts))
    for name in columns[0]:
        style = "bold" if name == "total" else None
        table.add_row(name, *(column[name] for column in columns), style=style)
    return table


def _stage_figures(estimate: MemoryEstimate, counts: RunCounts) -> dict[str, str]:
    """Returns a stage's figures by purpose."""
    shown = ("student weights", "optimizer", "teacher weights", "activations")
    parts = {purpose: estimate.device.get(purpose) for purpose in shown}
    chunks = estimate.device.get("loss")
    rest = estimate.total - sum(part or 0 for part in (*parts.values(), chunks))
    return {
        **{purpose: memory_figure(part) for purpose, part in parts.items()},
        "logits": f"({memory_figure(counts.step.loss / 1e9)})"
        if chunks is None
        else memory_figure(chunks),
        "rest": memory_figure(rest),
        "total": memory_figure(estimate.total),
        "in main memory": memory_figure(sum(estimate.host.values()) or None),
    }


def memory_figure(gigabytes: float | None) -> str:
    """Returns an amount with its unit: MB below 0.1 GB, where two decimals would say nothing."""
    if gigabytes is None:
        return ""
    if gigabytes >= 0.1:
        return f"{gigabytes:.2f} GB"
    megabytes = 1e3 * gigabytes
    return f"{megabytes:.{1 if megabytes < 10 else 0}f} MB"
