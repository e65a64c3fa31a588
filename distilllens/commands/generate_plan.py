"""What the command ``generate`` has to do: which prompts, what of them is there, with which key."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from distilllens.config import ModelConfig, TrainConfig
from distilllens.data.encode import encode_prompts
from distilllens.data.generated import RECEIPT, RECORDS, read_receipt
from distilllens.data.records import Record, file_sha256, read_records
from distilllens.errors import ConfigError, DataError
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint
from distilllens.evaluation.generation import check_context_window
from distilllens.models import load_model_config, load_tokenizer
from distilllens.runtime.shards import Shard, check_same_key, cut_shards

FORMAT_VERSION = 2
"""Raised whenever the same options would give other answers or other files."""
SHARD_PROMPTS = 256
"""Prompts of a shard: what a stopped process loses at most."""
PARTS = "parts"
"""Folder of the finished shards; with them, more prompts or another choice cost only the rest."""
OPTION = "data.generated"
ANOTHER = "give the same options, another --data.generated, or remove that folder"
NOT_IN_THE_KEY = ("batch_size", "batch_tokens", "keep_truncated", "limit")
"""Settings that change no answer: they choose among them, or their company."""


class Prompt(NamedTuple):
    """A training record to answer, and its place among all records of the file, from 0."""

    place: int
    record: Record


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
    tokenizer = load_tokenizer(
        model.teacher, trust_remote_code=trust, revision=revision, option="--model.teacher"
    )
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
        check_same_key(OPTION, folder, receipt["key"], key, fix=ANOTHER)
    prompts = fitting[: config.generate.limit]
    shards = cut_shards([1] * len(prompts), SHARD_PROMPTS)
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


def is_whole(job: GenerateJob) -> bool:
    """Whether raw.jsonl is there as these options make it; its parts may be gone by then."""
    receipt, settings = read_receipt(job.folder), job.config.generate
    if receipt is None or not (job.folder / RECORDS).is_file():
        return False
    stored = receipt["limit"], receipt["keep_truncated"], receipt["records_sha256"]
    sha256 = file_sha256(job.folder / RECORDS)
    return stored == (settings.limit, settings.keep_truncated, sha256)


def part_path(folder: Path, shard: Shard) -> Path:
    """Returns a shard's file."""
    return folder / PARTS / f"{shard.number:05d}.json"


def read_part(folder: Path, shard: Shard, key: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what was stored of a shard; None if it is not there or lacks some of its answers.

    Raises:
        ConfigError: It was made with another key.
    """
    try:
        content = json.loads(part_path(folder, shard).read_text(encoding="utf-8"))
        stored, answers = dict(content["key"]), list(content["answers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    check_same_key(OPTION, folder, stored, key, fix=ANOTHER)
    wanted = shard.rows * int(key["generate.samples"])
    return {**content, "answers": answers[:wanted]} if len(answers) >= wanted else None
