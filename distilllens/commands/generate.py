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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.config import ModelConfig, TrainConfig
from distilllens.data.encode import encode_prompts
from distilllens.data.generated import RECEIPT, RECORDS, read_receipt
from distilllens.data.progress import track
from distilllens.data.records import Record, file_sha256, read_records
from distilllens.errors import ConfigError, DataError, StorageError
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint, differences
from distilllens.evaluation.cells.shares import own_share
from distilllens.evaluation.decoding.sampling import example_seed
from distilllens.evaluation.generation import check_context_window, generate_answers
from distilllens.evaluation.protocol import DTYPES, local_device
from distilllens.families import base_model
from distilllens.models import load_model_config, load_teacher, load_tokenizer
from distilllens.runs import git_commit, versions, write_json
from distilllens.runtime import distributed
from distilllens.runtime.manifest import HashedFile, sync
from distilllens.runtime.signals import StopRequest

FORMAT_VERSION = 2
"""Raised whenever the same options would give other answers or other files."""
SHARD_PROMPTS = 256
"""Prompts of a shard: what a stopped process loses at most."""
PARTS = "parts"
"""Folder of the finished shards; with them, more prompts or another choice cost only the rest."""
NOT_IN_THE_KEY = ("batch_size", "batch_tokens", "keep_truncated", "limit")
"""Settings that change no answer: they choose among them, or their company."""


class Prompt(NamedTuple):
    """A training record to answer, and its place among all records of the file, from 0."""

    place: int
    record: Record


class Shard(NamedTuple):
    """Prompts ``first`` to ``stop`` - 1 of those that are answered."""

    number: int
    first: int
    stop: int

    @property
    def file(self) -> str:
        """Name in the folder of parts."""
        return f"{self.number:05d}.json"


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """What will be answered, and what of it is still missing."""

    config: TrainConfig
    folder: Path
    key: dict[str, Any]
    """Everything that decides the answers."""
    tokenizer: PreTrainedTokenizerBase
    num_records: int
    """Training records, those with over-long prompts and those beyond the limit too."""
    num_overlong: int
    prompts: list[Prompt]
    shards: list[Shard]
    missing: list[Shard]


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
        open_folder(job.folder)
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


# --- What is to be done -------------------------------------------------------------------------


def plan_generation(config: TrainConfig) -> GenerateJob:
    """Reads records and tokenizer and finds what is missing; loads no weights.

    Raises:
        ConfigError, DataError: As `generate`.
    """
    model, data = config.model, config.data
    if data.generated is None or model.teacher is None:
        missing = "--data.generated, the folder to write" if model.teacher else "--model.teacher"
        raise ConfigError(f"generate needs {missing}")
    if model.teacher_placement != "device":
        raise ConfigError(
            f"generate needs model.teacher_placement=device, not {model.teacher_placement}",
            why="each process answers prompts of its own, with a whole teacher",
            fix="--model.teacher_quantization 8bit or 4bit, if it does not fit",
        )
    folder = Path(data.generated)
    check_folder(folder)
    trust, revision = model.trust_remote_code, model.revision
    tokenizer = load_tokenizer(model.teacher, trust_remote_code=trust, revision=revision)
    raw_file = Path(data.path) / RECORDS
    file = read_records(raw_file, bad_lines=data.bad_lines)
    dev_size = config.eval.dev_size
    records = [Prompt(place, record) for place, record in enumerate(file.records)][dev_size:]
    lengths = [len(ids) for ids in encode_prompts(tokenizer, [p.record.prompt for p in records])]
    fitting = [
        prompt
        for prompt, length in zip(records, lengths, strict=True)
        if length <= data.max_prompt_length
    ]
    if not fitting:
        raise DataError(
            f"{raw_file}: no prompt to answer",
            why=f"of {len(file.records)} records {dev_size} are the dev set, and no other prompt "
            f"is within {data.max_prompt_length} tokens",
            fix="lower --eval.dev_size or raise --data.max_prompt_length",
        )
    check_context_window(
        load_model_config(model.teacher, trust_remote_code=trust, revision=revision),
        max(length for length in lengths if length <= data.max_prompt_length),
        config.generate.max_new_tokens,
        section="generate",
        prompt_key="data.max_prompt_length",
    )
    key = generation_key(config, raw_sha256=file.sha256)
    receipt = read_receipt(folder)
    if receipt is not None:
        check_same_key(folder, receipt["key"], key)
    prompts = fitting[: config.generate.limit]
    shards = plan_shards(len(prompts))
    return GenerateJob(
        config=config,
        folder=folder,
        key=key,
        tokenizer=tokenizer,
        num_records=len(records),
        num_overlong=len(records) - len(fitting),
        prompts=prompts,
        shards=shards,
        missing=[shard for shard in shards if read_part(folder, shard, key) is None],
    )


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds anything but generated answers, data sets above all.

    Raises:
        ConfigError: It does.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    shown = {name for name in names if not name.startswith(".")}
    foreign = sorted(shown - {PARTS, RECORDS, RECEIPT})
    if not foreign and shown and not shown & {PARTS, RECEIPT}:
        foreign = sorted(shown)  # records alone are somebody's data set
    if foreign or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"data.generated={folder} holds other things than generated answers",
            why=f"for example {foreign[0]}" if foreign else "it is a file",
            fix="give an empty or new folder with --data.generated",
            kept="everything in it is untouched",
        )


def generation_key(config: TrainConfig, *, raw_sha256: str) -> dict[str, Any]:
    """Returns everything that decides the answers, by option where it is one."""
    model = config.model
    assert model.teacher is not None
    adapter = model.teacher_lora
    settings = dataclasses.asdict(config.generate)
    return {
        "data": raw_sha256,
        "dev_size": config.eval.dev_size,
        "max_prompt_length": config.data.max_prompt_length,
        "teacher": checkpoint_fingerprint(model.teacher, model.revision),
        "teacher_lora": None if adapter is None else checkpoint_fingerprint(adapter),
        "teacher_dtype": teacher_dtype(model),
        "teacher_quantization": model.teacher_quantization,
        "attention": model.attention,
        **{f"generate.{k}": v for k, v in settings.items() if k not in NOT_IN_THE_KEY},
        "format_version": FORMAT_VERSION,
    }


def teacher_dtype(model: ModelConfig) -> str:
    """Returns the precision that the teacher answers in; ``auto``: that of its checkpoint."""
    return model.dtype if model.teacher_dtype == "auto" else model.teacher_dtype


def check_same_key(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses to go on with answers of something else.

    Raises:
        ConfigError: Names each part that differs, with both values.
    """
    if different := differences(stored, wanted):
        raise ConfigError(
            f"data.generated={folder} holds answers of something else: {'; '.join(different)}",
            fix="give the same options, another --data.generated, or remove that folder",
            kept="everything in it is untouched",
        )


def plan_shards(count: int) -> list[Shard]:
    """Cuts prompts into shards; more prompts change the last shard at most."""
    return [
        Shard(number, first, min(first + SHARD_PROMPTS, count))
        for number, first in enumerate(range(0, count, SHARD_PROMPTS))
    ]


def is_whole(job: GenerateJob) -> bool:
    """Whether raw.jsonl is there as these options make it; its parts may be gone by then."""
    receipt, settings = read_receipt(job.folder), job.config.generate
    if receipt is None or not (job.folder / RECORDS).is_file():
        return False
    stored = receipt["limit"], receipt["keep_truncated"], receipt["records_sha256"]
    sha256 = file_sha256(job.folder / RECORDS)
    return stored == (settings.limit, settings.keep_truncated, sha256)


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
    total = sum(shard.stop - shard.first for shard in shards) * job.config.generate.samples
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


def open_folder(folder: Path) -> None:
    """Makes the folder; a receipt that is about to be wrong goes first.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        (folder / RECEIPT).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def write_part(folder: Path, shard: Shard, content: dict[str, Any]) -> None:
    """Writes a shard, which appears whole or not at all.

    Raises:
        StorageError: No space, or no right to write.
    """
    path = folder / PARTS / shard.file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise _unwritable(path, error) from None


def read_part(folder: Path, shard: Shard, key: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what was stored of a shard; None if it is not there or lacks some of its answers.

    Raises:
        ConfigError: It was made with another key.
    """
    try:
        content = json.loads((folder / PARTS / shard.file).read_text(encoding="utf-8"))
        stored, answers = dict(content["key"]), list(content["answers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    check_same_key(folder, stored, key)
    wanted = (shard.stop - shard.first) * int(key["generate.samples"])
    return {**content, "answers": answers[:wanted]} if len(answers) >= wanted else None


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
                    raise StorageError(
                        f"{job.folder} lacks parts that other processes wrote",
                        why="all processes must see the same folder",
                    )
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
        raise _unwritable(job.folder, error) from None
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


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}",
        why=error.strerror or str(error),
        fix="free the disk, or choose another --data.generated",
        kept="finished shards; the same command goes on with the others",
    )
