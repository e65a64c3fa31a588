"""Samples the teacher's answers to the training prompts: `python -m distilllens generate`.

Sequence-level distillation (Kim & Rush 2016) trains on them instead of the records' own. The
command takes the options of the training that will; several processes share the work:
`torchrun --nproc_per_node 4 -m distilllens generate …`.

The prompts are cut into shards. A process answers every world-size-th of those that are missing and
writes each to FOLDER/parts; the first process then joins them to raw.jsonl. Samples are seeded by
the prompt's place in the file, so in float32 neither the number of processes nor the batch size nor
a stop in between changes that file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from distilllens.commands.generate_plan import (
    OPTION,
    PARTS,
    GenerateJob,
    is_whole,
    part_path,
    plan_generation,
    read_part,
    teacher_dtype,
)
from distilllens.config import TrainConfig
from distilllens.data.generated import RECEIPT, RECORDS
from distilllens.data.progress import track
from distilllens.errors import DataError
from distilllens.evaluation.cells.shares import own_share
from distilllens.evaluation.decoding.sampling import example_seed
from distilllens.evaluation.generation import generate_answers
from distilllens.evaluation.protocol import DTYPES, local_device
from distilllens.families import base_model
from distilllens.models import load_teacher
from distilllens.runs import git_commit, versions, write_json
from distilllens.runtime import distributed
from distilllens.runtime.manifest import HashedFile, sync
from distilllens.runtime.shards import Shard, open_folder, shards_missing, unwritable_shard
from distilllens.runtime.signals import StopRequest


def generate(config: TrainConfig, stop: StopRequest) -> None:
    """Makes what is missing of the folder that ``data.generated`` names.

    Args:
        config: Of the training that will read it. With ``dry_run`` nothing is written.
        stop: Signals.

    Raises:
        ConfigError: No folder or teacher named, a context window that is too small, or the folder
            holds something else.
        DataError: Broken records, none to answer, or only empty answers.
        NumericsError: The teacher's logits are not finite.
        StorageError: Too little space, or no right to write.
        Stopped: SIGINT or SIGTERM; finished shards are kept.
    """
    console = Console(quiet=not distributed.is_main(), soft_wrap=True, highlight=False)
    job = plan_generation(config)
    there = len(job.shards) - len(job.missing)
    console.print(
        f"{job.folder}: {len(job.prompts):,} of {job.num_records:,} training prompts "
        f"({job.num_overlong:,} over {config.data.max_prompt_length} tokens dropped) × "
        f"{config.generate.samples} answers in {len(job.shards)} shards, {there} there already",
        markup=False,
    )
    if config.dry_run:
        console.print("dry run: nothing was written")
        return
    if is_whole(job):
        console.print(f"{job.folder}: all is there already", markup=False)
        return
    _wait(stop)  # all have seen what is there before anything changes
    if distributed.is_main():
        open_folder(OPTION, job.folder / PARTS, job.folder / RECEIPT)
    if own := job.missing[distributed.rank() :: distributed.world_size()]:
        with own_share():
            answer_shards(job, own, stop, console)
    _wait(stop)
    if distributed.is_main():
        console.print(describe(finish(job), job.folder), markup=False)
    _wait(stop)


def _wait(stop: StopRequest) -> None:
    try:
        distributed.barrier()
    except RuntimeError:  # another process has left, as this one should have, by the same signal
        stop.poll("waiting for the other processes; finished shards are kept")
        raise


# --- Answering ----------------------------------------------------------------------------------


def answer_shards(
    job: GenerateJob, shards: Sequence[Shard], stop: StopRequest, console: Console
) -> None:
    """Loads the teacher, answers shards and writes each when it is done.

    Raises:
        ConfigError, NumericsError, StorageError, Stopped: As `generate`.
    """
    console.print("loading the teacher …")
    teacher = load_teacher(job.config.model, dtype=DTYPES[teacher_dtype(job.config.model)])
    module: torch.nn.Module = teacher
    module.to(local_device())
    model = base_model(teacher)
    total = sum(shard.rows for shard in shards) * job.config.generate.samples
    with track("answering", "answers", total=total, console=console) as advance:

        def advance_or_stop(count: int) -> None:
            advance(count)
            stop.poll("answering; finished shards are kept")

        for shard in shards:
            answers = answer_shard(job, shard, model, advance_or_stop)
            content = {"key": job.key, "device": model.device.type, "answers": answers}
            write_part(job.folder, shard, content)


def answer_shard(
    job: GenerateJob, shard: Shard, model: PreTrainedModel, progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Returns the answers to a shard's prompts: all samples of the first, then of the second …"""
    settings = job.config.generate
    prompts = job.prompts[shard.first : shard.stop]
    columns = [
        generate_answers(
            model,
            job.tokenizer,
            [prompt.record.prompt for prompt in prompts],
            settings=settings,
            seed=example_seed(settings.seed, sample),
            max_prompt_length=job.config.data.max_prompt_length,
            indices=[prompt.place for prompt in prompts],
            progress=progress,
        )
        for sample in range(settings.samples)
    ]
    return [
        {
            "index": prompt.place,
            "sample": sample,
            "text": answer.text,
            "num_tokens": answer.num_tokens,
            "truncated": answer.truncated,
        }
        for prompt, answers in zip(prompts, zip(*columns, strict=True), strict=True)
        for sample, answer in enumerate(answers)
    ]


# --- Files --------------------------------------------------------------------------------------


def write_part(folder: Path, shard: Shard, content: dict[str, Any]) -> None:
    """Writes a shard, which appears whole or not at all.

    Raises:
        StorageError: No space, or no right to write.
    """
    path = part_path(folder, shard)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise unwritable_shard(OPTION, path, error) from None


def finish(job: GenerateJob) -> dict[str, Any]:
    """Joins the parts, one in memory at a time, and writes and returns the receipt.

    Raises:
        DataError: All answers are empty.
        StorageError: No space, or a part that another process wrote is not there.
    """
    settings = job.config.generate
    draft = job.folder / f".{RECORDS}.tmp"
    totals: Counter[str] = Counter()
    devices = set()
    try:
        draft.unlink(missing_ok=True)
        with HashedFile(draft) as file:
            for shard in job.shards:
                part = read_part(job.folder, shard, job.key)
                if part is None:
                    raise shards_missing(OPTION, job.folder)
                devices.add(part["device"])
                totals += write_answers(file, job, shard, part["answers"])
        records = file.record()
        if not totals["written"]:
            draft.unlink()
            raise DataError(
                f"{job.folder}: none of {totals['answers']} answers is fit to train on",
                why=f"{totals['empty']} are empty, {totals['truncated']} ended by length",
            )
        os.replace(draft, job.folder / RECORDS)
        sync(job.folder)
        receipt = {
            "key": job.key,
            "limit": settings.limit,
            "keep_truncated": settings.keep_truncated,
            "records_sha256": records.sha256,
            "teacher": job.config.model.teacher,
            "counts": {
                "training_records": job.num_records,
                "overlong_prompts": job.num_overlong,
                "prompts": len(job.prompts),
                **{name: totals[name] for name in ("answers", "empty", "truncated", "written")},
            },
            "mean_tokens": totals["tokens"] / totals["written"],
            "devices": sorted(devices),
            "config": dataclasses.asdict(job.config),
            "versions": versions(),
            "git_commit": git_commit(),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(job.folder / RECEIPT, receipt)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise unwritable_shard(OPTION, job.folder, error) from None
    return receipt


def write_answers(
    file: HashedFile, job: GenerateJob, shard: Shard, answers: Sequence[dict[str, Any]]
) -> Counter[str]:
    """Writes a shard's answers as records, but for empty ones; returns what became of them."""
    totals: Counter[str] = Counter()
    prompts = {prompt.place: prompt for prompt in job.prompts[shard.first : shard.stop]}
    for answer in answers:
        # A byte-level model may say NUL, which no record can hold: as other bytes that are no text.
        text = answer["text"].replace("\0", "\N{REPLACEMENT CHARACTER}")
        is_empty, is_cut = not text.strip(), answer["truncated"]
        totals.update(answers=1, empty=is_empty, truncated=is_cut)
        if is_empty or (is_cut and not job.config.generate.keep_truncated):
            continue
        record = prompts[answer["index"]].record
        line = {
            "instruction": record.instruction,
            "input": record.input,
            "output": text,
            "prompt": record.prompt,
            "truncated": is_cut,
            "index": answer["index"],
            "sample": answer["sample"],
        }
        file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        totals.update(written=1, tokens=answer["num_tokens"])
    return totals


def describe(receipt: dict[str, Any], folder: Path) -> str:
    """Returns what a user should know of the answers."""
    counts = receipt["counts"]
    kept = "kept" if receipt["keep_truncated"] else "left out"
    return (
        f"{folder}: {counts['written']:,} answers, {receipt['mean_tokens']:.1f} tokens on average; "
        f"{counts['empty']:,} empty ones left out, {counts['truncated']:,} ended by length ({kept})"
    )
