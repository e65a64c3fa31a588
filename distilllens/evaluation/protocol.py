"""The evaluation protocol: every set × every seed, one folder each, resumable, over many ranks.

A *cell* is one set with one sampling seed; finished ones are skipped. Every answer is on the disk
when it is there, so a stopped or killed evaluation goes on in the middle of a cell. The ranks of a
torchrun share what is missing (see `shares`). Samples are seeded by example, so in float32 none of
this changes a result.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
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
from distilllens.evaluation.cells.finish import finish_cell
from distilllens.evaluation.cells.metrics_table import build_metrics_table
from distilllens.evaluation.cells.partial import PartialWriter
from distilllens.evaluation.cells.plan import (
    Cell,
    check_windows,
    find_missing,
    load_set,
    no_usable_prompt,
    plan_cells,
)
from distilllens.evaluation.cells.prompts import fit_prompts
from distilllens.evaluation.cells.provenance import method_name
from distilllens.evaluation.cells.results import build_table, check_writable, read_result
from distilllens.evaluation.cells.shares import Share, deal, on_all_ranks, own_share
from distilllens.evaluation.generation import Answer, generate_answers
from distilllens.evaluation.measures.run import plan_measures, run_measures
from distilllens.evaluation.scoring.pool import Score, Scorer, compute_metrics, score_samples
from distilllens.evaluation.vllm import backend as vllm_backend
from distilllens.models import load_model, load_tokenizer
from distilllens.runtime import distributed
from distilllens.runtime.lock import locked
from distilllens.runtime.signals import StopRequest, poll, stoppable

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
        records: The dev records.
        settings: Sampling settings, batch size, and what becomes of long prompts.
        seed: Sampling seed.
        max_prompt_length: Longest prompt in tokens.
        rank: This process's rank.
        world_size: Number of processes that share the work.
        stop: Asked each time a batch's number of answers has come, by all ranks equally often.

    Raises:
        ConfigError: The longest prompt and its answer exceed the model's context window, or a
            prompt cannot be cut to the limit.
        DataError: Every prompt was dropped.
        NumericsError: The model's logits are not finite.
        Stopped: A rank was asked to stop: raised by all of them after the same batch.
    """
    kept = fit_prompts(
        tokenizer, records, limit=max_prompt_length, long_prompts=settings.long_prompts
    ).records
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

    Under torchrun (``WORLD_SIZE`` > 1) each rank answers a share of what is missing.

    Args:
        config: Checkpoint, sets, seeds, settings, output folder.

    Returns:
        The results of all cells, as in the results.json files; on ranks other than 0 and in a dry
        run, nothing.

    Raises:
        ConfigError: A model folder that is not there, settings out of range, a context window
            that is too small, results of another evaluation in the output folder, or another
            process that is writing there.
        DataError: A set that is not there, a broken record, no usable prompt.
        NumericsError: The model's logits are not finite.
        StorageError: The output folder cannot be written.
        Stopped: A signal ended it after a batch; what is answered is kept.
    """
    if config.backend == "vllm":
        vllm_backend.check_vllm(config)
    console = Console(highlight=False, markup=False)
    with process_group() as (rank, world_size):
        console.quiet = rank != 0
        tokenizer = load_tokenizer(
            config.checkpoint,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
            option="--checkpoint",
        )
        sets = [load_set(name, tokenizer, config) for name in config.sets]
        check_windows(config, sets)
        if config.dry_run:
            cells = plan_cells(config, sets)
            _print_plan(console, config, cells)
            plan_measures(config, tokenizer, cells, console)
            return []
        # What cannot be measured is told before anything is made; planned again under the lock.
        plan_measures(config, tokenizer, plan_cells(config, sets), Console(quiet=True))
        folder = Path(config.output_dir)
        check_writable(folder)
        with locked(folder / "evaluate.lock", "--output_dir") as note, stoppable():
            if note:
                console.print(note, soft_wrap=True)
            cells = plan_cells(config, sets)
            _print_plan(console, config, cells)
            measures = plan_measures(config, tokenizer, cells, console)
            _answer_and_score(config, tokenizer, cells, console)
            on_all_ranks(lambda: None)
            run_measures(
                measures,
                config,
                tokenizer,
                console,
                rank=rank,
                world_size=world_size,
                device=local_device(),
                dtype=DTYPES[config.dtype],
            )
            if rank != 0:
                return []
            results = [read_result(cell.folder / "results.json") for cell in cells]
        console.print(build_table(results, title=f"{method_name(config)} ({config.checkpoint})"))
        console.print(build_metrics_table(results))
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
    table = Table(title=f"Sets of {config.data_dir}; prompts of {config.max_prompt_length} tokens")
    for header in ("set", "prompts", "longer: dropped", "longer: cut", "longest"):
        table.add_column(header, justify="left" if header == "set" else "right")
    for data in {cell.data.name: cell.data for cell in cells}.values():
        numbers = (len(data.records), data.num_dropped, len(data.cut), data.longest_prompt)
        table.add_row(data.name, *map(str, numbers))
    console.print(table)


def _answer_and_score(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[Cell],
    console: Console,
) -> None:
    """Answers what is missing, this rank its share, and writes all cells."""
    # The first rank looks, before anybody writes: else the ranks could deal differently.
    missing = distributed.on_main(lambda: find_missing(cells, overwrite=config.overwrite))
    assert missing is not None
    open_cells = [
        (cell, rows) for cell, rows in zip(cells, missing, strict=True) if rows is not None
    ]
    if there := sum(len(cell.data.records) - len(rows) for cell, rows in open_cells):
        console.print(f"{there:,} answers of unfinished cells are there already", soft_wrap=True)
    shares = deal(missing, distributed.world_size())[distributed.rank()]
    with own_share():
        own = _run_shares(config, tokenizer, cells, shares, console)
    scores: dict[int, dict[int, Score]] = {}
    for hand in on_all_ranks(lambda: own):
        for number, known in hand.items():
            scores.setdefault(number, {}).update(known)
    for number, known in sorted(scores.items()) if distributed.is_main() else ():
        finish_cell(config, cells[number], known, console)


def _run_shares(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[Cell],
    shares: Sequence[Share],
    console: Console,
) -> dict[int, dict[int, Score]]:
    """Answers this rank's shares, and writes the cells that nobody else has a share of.

    Returns:
        Scores of the others by the cell's place in the plan and the row.
    """
    if not shares:
        return {}
    model = load_answering_model(config) if any(share.rows for share in shares) else None
    pairs = sum(
        len(cells[share.cell].data.records[row].outputs) for share in shares for row in share.rows
    )
    shared: dict[int, dict[int, Score]] = {}
    with Scorer(config.score_workers, pairs=pairs) as scorer:
        for position, share in enumerate(shares, start=1):
            cell = cells[share.cell]
            if model is not None and share.rows:
                label = f"{cell.label} ({position}/{len(shares)})"
                _answer_share(config, model, tokenizer, cell, share, scorer, label, console)
            scores = scorer.collect()
            if share.is_whole:
                finish_cell(config, cell, scores, console)
            else:
                shared[share.cell] = scores
    return shared


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


def _answer_share(
    config: EvaluateConfig,
    model: PreTrainedModel | vllm_backend.VllmModel,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    share: Share,
    scorer: Scorer,
    label: str,
    console: Console,
) -> None:
    """Answers rows of a cell; keeps each answer, and hands it to the scorer, when it is there."""
    records = cell.data.records
    head = {
        "identity": cell.identity,
        "seed": cell.seed,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    with (
        closing(PartialWriter(cell.folder, rank=distributed.rank(), head=head)) as partial,
        track(label, "answers", total=len(share.rows), console=console) as advance,
    ):

        def keep(position: int, answer: Answer) -> None:
            row = share.rows[position]
            partial.append(row, answer)
            scorer.add(row, answer.text, records[row].outputs)

        def advance_or_stop(count: int) -> None:
            advance(count)
            poll(f"answering {label}; what is answered is kept")

        generate: Any = generate_answers
        if config.backend == "vllm":
            generate = vllm_backend.generate_answers
        generate(
            model,
            tokenizer,
            [records[row].prompt for row in share.rows],
            settings=config.eval,
            seed=cell.seed,
            max_prompt_length=config.max_prompt_length,
            indices=share.rows,
            progress=advance_or_stop,
            on_answer=keep,
        )


def local_device() -> torch.device:
    """Returns this process's GPU, or the CPU, outside the process group of a training."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Yields rank and world size; joins the process group of a torchrun.

    gloo also on GPUs: the ranks only wait for each other. A rank that dies breaks its connections,
    which ends the wait; a rank that is merely slower may take days.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())  # kernels of some models start on the current one
    is_mine = not dist.is_initialized()
    if is_mine:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if is_mine:
            dist.destroy_process_group()
