"""Tokenised records: made once, kept as memory-mapped Arrow tables, reused by fingerprint.

A prepared folder holds ``train/`` and ``dev/`` (datasets' ``save_to_disk``), ``manifest.json`` and,
if lines were skipped, ``broken_lines.jsonl``.
Everything that decides the tokens is in the manifest's ``source``: where one part of it differs,
the folder is built anew beside the old one and takes its place by renaming.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from distilllens.config import DataConfig
from distilllens.data.encode import encode_prompts, encode_responses, tokenizer_fingerprint
from distilllens.data.generated import RECORDS, check_generated, merge_answers
from distilllens.data.progress import track
from distilllens.data.prompts import alpaca_prompt
from distilllens.data.records import Record, file_sha256, read_records
from distilllens.errors import ConfigError, DataError, StorageError
from distilllens.runtime.signals import poll, stoppable

FORMAT_VERSION = 1
"""Raised whenever the same source would give other tokens or other columns."""
QUARANTINE = "broken_lines.jsonl"
"""In a prepared folder: the lines that were skipped, with their numbers and what is wrong."""
CHUNK_RECORDS = 1000
"""Records tokenised at once: the unit of progress, and of memory held as Python lists."""

TOKEN_FEATURES = {"prompt_ids": List(Value("int32")), "response_ids": List(Value("int32"))}
TEXT_FEATURES = {"prompt": Value("string"), "reference": Value("string")}


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """What became of the records of one part; all in records but for the three in tokens."""

    records: int = 0
    used: int = 0
    overlong_prompts: int = 0
    empty_answers: int = 0
    cut_responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The tokenised data of a run.

    ``train`` and ``dev`` have the columns prompt_ids and response_ids (int32; a response ends with
    EOS unless it was cut); dev also prompt and reference (texts). ``stats`` is plain JSON:
    {"lines", "skipped_lines", "train": PartCounts, "dev": PartCounts} of the stored data, and with
    generated answers {"generated": {"teacher", "answers", "keep_gold"}}.
    """

    train: Dataset
    dev: Dataset
    folder: Path
    source: dict[str, Any]
    """What it was made of, as plain JSON: hashes of the files and the tokenizer, the options."""
    fingerprint: str
    """Of ``source``."""
    stats: dict[str, Any]

    def summary(self) -> str:
        """Returns one line that tells every count a user should know of."""
        train, dev = self.stats["train"], self.stats["dev"]
        dropped = {
            "broken lines skipped": self.stats["skipped_lines"],
            "over-long prompts dropped": train["overlong_prompts"] + dev["overlong_prompts"],
            "empty answers dropped": train["empty_answers"] + dev["empty_answers"],
            "responses cut": train["cut_responses"] + dev["cut_responses"],
        }
        told = ", ".join(f"{number:,} {name}" for name, number in dropped.items())
        if generated := self.stats.get("generated"):
            told += f"; {generated['answers']:,} answers are {generated['teacher']}'s" + (
                ", beside the records' own" if generated["keep_gold"] else ""
            )
        return (
            f"{self.folder}: {len(self.train):,} training and {len(self.dev):,} dev records, "
            f"{int(response_rows(self.train).sum()):,} response tokens to train on; {told}"
        )


def prepare_dataset(
    *,
    data: DataConfig,
    dev_size: int,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    build: bool = True,
    write: bool = True,
    console: Console | None = None,
) -> PreparedData:
    """Tokenises data.path/raw.jsonl, or opens what was tokenised before from the same source.

    With several processes, rank 0 calls it with ``build=True``, then, after a barrier, the
    others with ``build=False``.

    Args:
        data: Where the records are, where tokens go, the lengths, what broken lines do.
        dev_size: Records at the file's head that are the dev set.
        tokenizer: The student's.
        family: Model type (gpt2, llama, qwen2 …), in the name of the default folder.
        build: Tokenise where needed, with progress; False: only open, and print nothing.
        write: Store what was tokenised; False: hold it in memory, and leave every folder as it is.
        console: For progress and counts; default: standard error.

    Raises:
        ConfigError: Lengths that leave no token for a response; a tokenizer without EOS.
        DataError: What `read_records` or `check_generated` finds wrong; no usable training
            record; with ``build=False``, a folder that does not fit.
        StorageError: The folder holds something else, or cannot be written.
        Stopped: A signal ended the tokenising; nothing was written.
    """
    _check_options(data, dev_size, tokenizer)
    raw_sha256 = file_sha256(Path(data.path) / RECORDS)
    source = {
        "raw_sha256": raw_sha256,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": alpaca_prompt("{instruction}") + alpaca_prompt("{instruction}", "{input}"),
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "dev_size": dev_size,
        "bad_lines": data.bad_lines,
        "format_version": FORMAT_VERSION,
    }
    receipt = None
    if data.generated is not None:
        receipt = check_generated(Path(data.generated), raw_sha256=raw_sha256, dev_size=dev_size)
        source["generated_sha256"] = receipt["records_sha256"]
        source["keep_gold"] = data.keep_gold
    folder = prepared_folder(data, family, _fingerprint(source))
    difference = _difference(folder, source)
    if difference and not build:
        raise DataError(
            f"{folder}: no tokenised data that fits this run: {difference}",
            fix="tokenise first: python -m distilllens prepare with this run's options",
        )
    if not difference:
        return _open(folder, train_size=data.train_size)
    console = console or Console(stderr=True)
    _check_replaceable(folder)
    if folder.exists():
        is_anew = "is" if write else "would be"
        console.print(f"{folder} {is_anew} tokenised anew: {difference}", soft_wrap=True)
    tokenised = _build(source, data=data, tokenizer=tokenizer, console=console)
    if receipt is not None:
        told = {"teacher": receipt["teacher"], "answers": receipt["counts"]["written"]}
        tokenised.stats["generated"] = {**told, "keep_gold": data.keep_gold}
    if write:
        _store(folder, source, tokenised, console)
        return _open(folder, train_size=data.train_size)
    return PreparedData(
        train=_first(tokenised.tables["train"], data.train_size),
        dev=tokenised.tables["dev"],
        folder=folder,
        fingerprint=_fingerprint(source),
        source=source,
        stats=tokenised.stats,
    )


def prepared_folder(data: DataConfig, family: str, fingerprint: str) -> Path:
    """Returns the folder of the tokenised data: data.processed or the conventional place.

    There each source has its own, so that runs with other lengths never replace each other's.
    """
    if data.processed is not None:
        return Path(data.processed)
    kind = "full"
    if data.generated is not None:
        kind = f"generated-{Path(data.generated).resolve().name}"
        kind += "-and-gold" if data.keep_gold else ""
    name = Path(data.path).resolve().name
    return Path("processed_data") / name / kind / f"{family}-{fingerprint[:8]}"


def record_lengths(table: Dataset) -> np.ndarray:
    """Returns the length in tokens of each record, prompt and response (int64)."""
    return _column_lengths(table, "prompt_ids") + _column_lengths(table, "response_ids")


def response_rows(table: Dataset) -> np.ndarray:
    """Returns how many rows `collate` finds in each record (int64).

    That is the response's length; without a prompt nothing predicts its first token.
    """
    prompt = _column_lengths(table, "prompt_ids")
    return np.maximum(_column_lengths(table, "response_ids") - (prompt == 0), 0)


def _column_lengths(table: Dataset, name: str) -> np.ndarray:
    arrow = table.with_format("arrow")[:]
    chunks = [chunk.value_lengths().to_numpy() for chunk in arrow[name].chunks]
    return np.concatenate([np.zeros(0, dtype=np.int64), *chunks])


def _check_options(data: DataConfig, dev_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if data.max_prompt_length >= data.max_length:
        raise ConfigError(
            f"data.max_prompt_length={data.max_prompt_length} must be < data.max_length="
            f"{data.max_length}",
            why="a prompt of that length must leave room for a response token",
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos_token", why="it marks the end of an answer")


def _fingerprint(source: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()


def _difference(folder: Path, source: dict[str, Any]) -> str:
    """Says why ``folder`` is not the data of ``source``; empty if it is."""
    if not folder.exists():
        return "it is not there"
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        stored, files = dict(manifest["source"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest.json cannot be read ({type(error).__name__})"
    for name in [*source, *stored]:  # answers of a teacher are in one of them only, or in none
        if stored.get(name) != source.get(name):
            return f"{name} was {_short(stored.get(name))}, now {_short(source.get(name))}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is damaged"
    return ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 12 else f"{text[:12]}…"


def _open(folder: Path, *, train_size: int | None) -> PreparedData:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    train = datasets.load_from_disk(str(folder / "train"))
    dev = datasets.load_from_disk(str(folder / "dev"))
    assert isinstance(train, Dataset) and isinstance(dev, Dataset)
    return PreparedData(
        train=_first(train, train_size),
        dev=dev,
        folder=folder,
        source=manifest["source"],
        fingerprint=_fingerprint(manifest["source"]),
        stats=manifest["stats"],
    )


def _first(table: Dataset, size: int | None) -> Dataset:
    return table if size is None or size >= len(table) else table.select(range(size))


def _check_replaceable(folder: Path) -> None:
    """Refuses to put tokenised data in the place of something else.

    Raises:
        StorageError: It is a link, or holds other things.
    """
    if folder.is_symlink():
        raise StorageError(
            f"{folder} is a symbolic link to {os.readlink(folder)}, and would be replaced",
            fix="give the folder itself with data.processed, or remove the link",
            kept="what it shows is untouched",
        )
    if folder.exists() and not _is_prepared(folder):
        raise StorageError(
            f"{folder} holds other things than tokenised data",
            fix="give an empty or new folder with data.processed",
        )


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """What a prepared folder is made of."""

    tables: dict[str, Dataset]
    stats: dict[str, Any]
    quarantine: str
    """The lines that were skipped; empty if none were."""


def _build(
    source: dict[str, Any],
    *,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> Tokenised:
    """Reads and tokenises all records; writes nothing."""
    raw_file = Path(data.path) / RECORDS
    file = read_records(raw_file, bad_lines=data.bad_lines)
    dev_size = source["dev_size"]
    parts = {"train": file.records[dev_size:], "dev": file.records[:dev_size]}
    if data.generated is not None:
        answers = read_records(Path(data.generated) / RECORDS).records
        parts["train"] = merge_answers(parts["train"], answers, keep_gold=data.keep_gold)
    num_records = sum(map(len, parts.values()))
    tables: dict[str, Dataset] = {}
    counts: dict[str, PartCounts] = {}
    with (
        stoppable(),
        track("tokenising", "records", total=num_records, console=console) as advance,
    ):
        for name, records in parts.items():
            tables[name], counts[name] = _tokenise(
                records, tokenizer, data, texts=name == "dev", advance=advance
            )
    _check_usable(raw_file, counts)
    for problem in file.problems[:10]:
        console.print(f"skipped {problem}", soft_wrap=True, highlight=False, markup=False)
    stats = {
        "lines": file.num_lines,
        "skipped_lines": file.num_skipped,
        **{name: asdict(part) for name, part in counts.items()},
    }
    return Tokenised(tables=tables, stats=stats, quarantine=file.quarantine())


def _store(folder: Path, source: dict[str, Any], tokenised: Tokenised, console: Console) -> None:
    """Puts the prepared folder in its place.

    Raises:
        StorageError: It cannot be written.
    """
    if tokenised.quarantine:
        console.print(f"all of them: {folder / QUARANTINE}", soft_wrap=True, markup=False)
    manifest = {"source": source, "stats": tokenised.stats}
    try:
        _write(folder, tokenised.tables, manifest, tokenised.quarantine)
    except OSError as error:
        if not _difference(folder, source):
            return  # another process built the same data meanwhile
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _check_usable(raw_file: Path, counts: dict[str, PartCounts]) -> None:
    train, dev = counts["train"], counts["dev"]
    if train.used == 0:
        raise DataError(
            f"{raw_file}: 0 usable training records",
            why=f"{train.records + dev.records} records: {dev.records} are the dev set, "
            f"{train.overlong_prompts} have over-long prompts, "
            f"{train.empty_answers} have empty answers",
            fix="lower eval.dev_size or raise data.max_prompt_length",
        )
    if dev.records > 0 and dev.used == 0:
        raise DataError(
            f"{raw_file}: 0 usable dev records",
            why=f"{dev.overlong_prompts} have over-long prompts, "
            f"{dev.empty_answers} have empty answers",
            fix="raise data.max_prompt_length or eval.dev_size; 0 goes without a dev set",
        )


def _tokenise(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    texts: bool,
    advance: Callable[[int], None],
) -> tuple[Dataset, PartCounts]:
    """Returns the table of the usable records, in their order, and what became of the others."""
    features = Features({**TOKEN_FEATURES, **TEXT_FEATURES} if texts else TOKEN_FEATURES)
    tables = [Dataset.from_dict({name: [] for name in features}, features=features)]
    counts = PartCounts(records=len(records))
    for start in range(0, len(records), CHUNK_RECORDS):
        poll("tokenising; nothing was written")
        chunk = records[start : start + CHUNK_RECORDS]
        columns: dict[str, list[Any]] = {name: [] for name in features}
        for row, cut in _usable_rows(chunk, tokenizer, data):
            for name, values in columns.items():
                values.append(row[name])
            length = len(row["prompt_ids"]) + len(row["response_ids"])
            counts = replace(
                counts,
                used=counts.used + 1,
                cut_responses=counts.cut_responses + cut,
                prompt_tokens=counts.prompt_tokens + len(row["prompt_ids"]),
                response_tokens=counts.response_tokens + len(row["response_ids"]),
                longest=max(counts.longest, length),
            )
        empty = sum(not record.outputs[0].strip() for record in chunk)
        counts = replace(counts, empty_answers=counts.empty_answers + empty)
        tables.append(Dataset.from_dict(columns, features=features))
        advance(len(chunk))
    overlong = counts.records - counts.used - counts.empty_answers
    table = datasets.concatenate_datasets(tables)
    return table, replace(counts, overlong_prompts=overlong)


def _usable_rows(
    chunk: Sequence[Record], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields the row of each record that has an answer and fits, and whether its answer was cut."""
    answered = [record for record in chunk if record.outputs[0].strip()]
    prompts = encode_prompts(tokenizer, [record.prompt for record in answered])
    responses = encode_responses(tokenizer, [record.outputs[0] for record in answered])
    for record, prompt_ids, response_ids in zip(answered, prompts, responses, strict=True):
        if len(prompt_ids) > data.max_prompt_length:
            continue
        if record.truncated:
            response_ids = response_ids[:-1]  # it goes on: an end there would be a lesson to stop
        room = data.max_length - len(prompt_ids)
        row = {
            "prompt_ids": prompt_ids,
            "response_ids": response_ids[:room],
            "prompt": record.prompt,
            "reference": record.outputs[0],
        }
        yield row, len(response_ids) > room


def _is_prepared(folder: Path) -> bool:
    """Whether a folder holds nothing but what `_write` puts there, so that it may be replaced."""
    return folder.is_dir() and {p.name for p in folder.iterdir()} <= {
        "train",
        "dev",
        QUARANTINE,
        "manifest.json",
    }


def _write(
    folder: Path, tables: dict[str, Dataset], manifest: dict[str, Any], quarantine: str
) -> None:
    """Saves the tables, the manifest last, and puts the whole in place by renaming."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}-{uuid4().hex[:8]}"
    building = folder.with_name(f".{folder.name}-building-{mark}")
    replaced = folder.with_name(f".{folder.name}-replaced-{mark}")
    try:
        with _quiet_datasets():
            for name, table in tables.items():
                # Without num_shards an empty table is saved as no file and cannot be loaded.
                shards = 1 if len(table) == 0 else None
                table.save_to_disk(str(building / name), num_shards=shards)
        if quarantine:
            (building / QUARANTINE).write_text(quarantine, encoding="utf-8")
        stored = sorted(path for path in building.rglob("*") if path.is_file())
        manifest["files"] = {str(p.relative_to(building)): p.stat().st_size for p in stored}
        manifest["fingerprint"] = _fingerprint(manifest["source"])
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (building / "manifest.json").write_text(text, encoding="utf-8")
        if folder.exists():
            os.rename(folder, replaced)
        try:
            os.rename(building, folder)
        except OSError:
            if replaced.exists() and not folder.exists():
                os.rename(replaced, folder)
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Saving shows a bar of its own for each part; a second is not worth one."""
    was_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_quiet:
            datasets.enable_progress_bars()
