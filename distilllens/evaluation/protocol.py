"""The evaluation protocol: every set × every seed, one folder each, resumable, over many ranks.

A *cell* is one set with one sampling seed. Cells are independent: they are dealt out to the ranks
of a torchrun, and finished ones are skipped, so a stopped evaluation goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.config import EvalConfig, EvaluateConfig
from distilllens.data.progress import track
from distilllens.data.records import Record
from distilllens.evaluation import vllm_backend
from distilllens.evaluation.generation import Answer, generate_answers
from distilllens.evaluation.plan import (
    Cell,
    check_settings,
    check_windows,
    deal,
    drop_long_prompts,
    load_set,
    no_usable_prompt,
    plan_cells,
)
from distilllens.evaluation.provenance import method_name
from distilllens.evaluation.results import build_table, check_writable, read_result, write_cell
from distilllens.evaluation.rouge import exact_match, rouge_l_max
from distilllens.models import load_model, load_tokenizer
from distilllens.runs import git_commit, versions
from distilllens.signals import StopRequest, poll, stoppable

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def score_samples(answers: Sequence[Answer], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns the line of samples.jsonl of each answer; ``rougeL`` is in [0, 1]."""
    return [
        {
            "index": index,
            "prompt": record.prompt,
            "references": list(record.outputs),
            "answer": answer.text,
            "num_tokens": answer.num_tokens,
            "truncated": answer.truncated,
            "rougeL": rouge_l_max(answer.text, record.outputs),
            "exact_match": exact_match(answer.text, record.outputs),
        }
        for index, (answer, record) in enumerate(zip(answers, records, strict=True))
    ]


def compute_metrics(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the means over samples.

    Returns:
        ``rougeL`` and ``exact_match`` × 100, ``num`` samples, ``truncated`` of them, and
        ``mean_tokens``.

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError("no samples to score")
    count = len(samples)
    # fsum is exact, so shares of a set, gathered in any order, give the same mean.
    return {
        "rougeL": 100 * math.fsum(sample["rougeL"] for sample in samples) / count,
        "exact_match": 100 * sum(sample["exact_match"] for sample in samples) / count,
        "num": count,
        "truncated": sum(sample["truncated"] for sample in samples),
        "mean_tokens": sum(sample["num_tokens"] for sample in samples) / count,
    }


def score(answers: Sequence[Answer], records: Sequence[Record]) -> dict[str, float]:
    """Returns the metrics of answers to records; see `compute_metrics`."""
    return compute_metrics(score_samples(answers, records))


def evaluate_dev_generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    settings: EvalConfig,
    seed: int,
    max_prompt_length: int,
    rank: int = 0,
    world_size: int = 1,
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """Generates answers to dev records and scores them, with the code of the final evaluation.

    With ``world_size`` > 1 every rank must call it: each takes a share of the records, and all
    return the metrics of the whole set, the same as one process would (in float32).

    Args:
        model: The student (of an adapter: ``get_base_model()``), on its device.
        tokenizer: Its tokenizer.
        records: The dev records; those with over-long prompts are left out.
        settings: Sampling settings and batch size.
        seed: Sampling seed.
        max_prompt_length: Longest prompt in tokens.
        rank: This process's rank.
        world_size: Number of processes that share the work.
        stop: Asked each time a batch's number of answers has come, by all ranks equally often.

    Raises:
        ConfigError: The longest prompt and its answer exceed the model's context window.
        DataError: No prompt is within the limit.
        NumericsError: The model's logits are not finite.
        Stopped: A rank was asked to stop: raised by all of them after the same batch.
    """
    kept, _ = drop_long_prompts(tokenizer, records, max_prompt_length)
    if not kept:
        raise no_usable_prompt("the dev set", len(records), max_prompt_length)
    share = range(rank, len(kept), world_size)
    # All ranks ask as often as the first, whose share is the largest.
    questions = math.ceil(len(kept) / (world_size * settings.batch_size))
    answered = asked = 0

    def ask(times: int) -> None:
        nonlocal asked
        for _ in range(times):
            asked += 1
            if stop is not None:
                stop.check("answering dev prompts")

    def count(answers: int) -> None:
        nonlocal answered
        answered += answers
        ask(answered // settings.batch_size - asked)

    answers = generate_answers(
        model,
        tokenizer,
        [kept[index].prompt for index in share],
        settings=settings,
        seed=seed,
        max_prompt_length=max_prompt_length,
        indices=share,
        progress=count,
    )
    ask(questions - asked)
    shares: list[Any] = [None] * world_size
    shares[rank] = score_samples(answers, [kept[index] for index in share])
    if world_size > 1:
        dist.all_gather_object(shares, shares[rank])
    return compute_metrics([sample for samples in shares for sample in samples])


def evaluate_checkpoint(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Scores a checkpoint on all sets with all seeds and prints the table.

    Under torchrun (``WORLD_SIZE`` > 1) each rank takes a share of the cells.

    Args:
        config: Checkpoint, sets, seeds, settings, output folder.

    Returns:
        The results of all cells, as in the results.json files; on ranks other than 0 and in a dry
        run, nothing.

    Raises:
        ConfigError: A model folder that is not there, settings out of range, a context window
            that is too small, results of another evaluation in the output folder.
        DataError: A set that is not there, a broken record, no usable prompt.
        NumericsError: The model's logits are not finite.
        StorageError: The output folder cannot be written.
        Stopped: A signal ended it after a batch; finished cells are kept.
    """
    check_settings(config)
    if config.backend == "vllm":
        vllm_backend.check_vllm(config)
    console = Console(highlight=False, markup=False)
    with process_group() as (rank, world_size):
        console.quiet = rank != 0
        tokenizer = load_tokenizer(
            config.checkpoint, trust_remote_code=config.trust_remote_code, revision=config.revision
        )
        sets = [load_set(name, tokenizer, config) for name in config.sets]
        check_windows(config, sets)
        cells = plan_cells(config, sets)
        _print_plan(console, config, cells)
        if config.dry_run:
            return []
        check_writable(Path(config.output_dir))
        # No rank may finish a cell before every rank has planned: they would deal differently.
        _barrier(world_size)
        mine = deal([cell for cell in cells if not cell.is_finished], world_size)[rank]
        if mine:
            _run_cells(config, tokenizer, mine, console)
        _barrier(world_size)
        if rank != 0:
            return []
        results = [read_result(cell.folder / "results.json") for cell in cells]
        console.print(build_table(results, title=f"{method_name(config)} ({config.checkpoint})"))
        console.print(f"results and samples: {config.output_dir}", soft_wrap=True)
        return results


def _print_plan(console: Console, config: EvaluateConfig, cells: Sequence[Cell]) -> None:
    finished = sum(cell.is_finished for cell in cells)
    console.print(
        f"{method_name(config)} ({config.checkpoint}): {len(cells)} cells"
        + (
            f", {finished} finished already, skipped (--overwrite scores again)" if finished else ""
        ),
        soft_wrap=True,
    )
    table = Table(title=f"Sets of {config.data_dir}")
    for header in ("set", "prompts", f"over {config.max_prompt_length} tokens, dropped", "longest"):
        table.add_column(header, justify="left" if header == "set" else "right")
    for data in {cell.data.name: cell.data for cell in cells}.values():
        numbers = (len(data.records), data.num_dropped, data.longest_prompt)
        table.add_row(data.name, *map(str, numbers))
    console.print(table)


def _run_cells(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[Cell],
    console: Console,
) -> None:
    """Loads the model on this rank's device, scores the cells and writes each when it is done."""
    model = load_answering_model(config)
    with stoppable():
        for position, cell in enumerate(cells, start=1):
            label = f"{cell.data.name} seed {cell.seed} ({position}/{len(cells)})"
            _run_cell(config, model, tokenizer, cell, label, console)


def load_answering_model(config: EvaluateConfig) -> PreTrainedModel | vllm_backend.VllmModel:
    """Loads the checkpoint into the back end that shall answer, on this rank's device."""
    if config.backend == "vllm":
        return vllm_backend.VllmModel(config)
    model = load_model(
        config.checkpoint,
        dtype=DTYPES[config.dtype],
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    module: torch.nn.Module = model
    module.to(local_device())
    return model


def _run_cell(
    config: EvaluateConfig,
    model: PreTrainedModel | vllm_backend.VllmModel,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    label: str,
    console: Console,
) -> None:
    start = time.monotonic()
    with track(label, "answers", total=len(cell.data.records), console=console) as advance:

        def advance_or_stop(count: int) -> None:
            advance(count)
            poll(f"answering {label}; finished cells are kept")

        generate: Any = generate_answers
        if config.backend == "vllm":
            generate = vllm_backend.generate_answers
        answers = generate(
            model,
            tokenizer,
            [record.prompt for record in cell.data.records],
            settings=config.eval,
            seed=cell.seed,
            max_prompt_length=config.max_prompt_length,
            progress=advance_or_stop,
        )
    samples = score_samples(answers, cell.data.records)
    result = _result(config, cell, model, samples, seconds=time.monotonic() - start)
    write_cell(cell.folder, result, samples)
    metrics = result["metrics"]
    console.print(
        f"{label}: Rouge-L {metrics['rougeL']:.2f}, exact match {metrics['exact_match']:.2f}, "
        f"{metrics['truncated']} of {metrics['num']} truncated",
        soft_wrap=True,
    )


def local_device() -> torch.device:
    """Returns this process's GPU, or the CPU, outside the process group of a training."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _result(
    config: EvaluateConfig,
    cell: Cell,
    model: PreTrainedModel | vllm_backend.VllmModel,
    samples: Sequence[dict[str, Any]],
    *,
    seconds: float,
) -> dict[str, Any]:
    """Returns the content of results.json."""
    metrics = compute_metrics(samples)
    dropped = cell.data.num_dropped
    return {
        "metrics": metrics,
        "set": cell.data.name,
        "seed": cell.seed,
        "name": method_name(config),
        "checkpoint": config.checkpoint,
        "identity": cell.identity,
        "counts": {
            "records": len(samples) + dropped,
            "scored": len(samples),
            "dropped_long_prompts": dropped,
            "truncated": metrics["truncated"],
        },
        "timing": {
            "seconds": round(seconds, 3),
            "tokens_per_second": round(metrics["mean_tokens"] * len(samples) / seconds, 1),
        },
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "git_commit": git_commit(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Yields rank and world size; joins the process group of a torchrun.

    gloo also on GPUs: the ranks only wait for each other. A rank that dies breaks its connections,
    which ends the wait; a rank that is merely slower may take days.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    is_mine = not dist.is_initialized()
    if is_mine:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if is_mine:
            dist.destroy_process_group()


def _barrier(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()
