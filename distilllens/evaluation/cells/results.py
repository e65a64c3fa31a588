"""The files of one cell (a set and a seed): written atomically, compared before they are reused.

A cell's folder is OUTPUT_DIR/seedN/SET. samples.jsonl is written first and results.json last, so
a results.json means that the cell is finished.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distilllens import errors
from distilllens.errors import ConfigError, StorageError
from distilllens.evaluation.cells.provenance import differences


def write_cell(
    folder: Path, result: Mapping[str, Any], samples: Iterable[Mapping[str, Any]]
) -> None:
    """Writes samples.jsonl, then results.json.

    Raises:
        StorageError: The folder cannot be written, or the disk is full.
    """
    lines = [json.dumps(sample, ensure_ascii=False, allow_nan=False) for sample in samples]
    _write_atomically(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    write_result(folder / "results.json", result)


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Writes a results file.

    Raises:
        StorageError: As `write_cell`.
    """
    text = json.dumps(result, ensure_ascii=False, allow_nan=False, indent=2)
    _write_atomically(file, f"{text}\n")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Reads the samples.jsonl of a finished cell.

    Raises:
        ConfigError: It is gone, or broken.
    """
    file = folder / "samples.jsonl"
    try:
        with file.open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read", why=str(error), fix="--overwrite scores the set again"
        ) from None


def _write_atomically(path: Path, text: str) -> None:
    """Writes beside ``path`` and renames, so that no reader and no kill sees half a file."""
    # A lone surrogate in a broken record cannot be UTF-8: it is written as its escape.
    content = text.encode("utf-8", errors="backslashreplace")
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def remove_leftovers(folder: Path) -> None:
    """Removes what a kill in the middle of `write_cell` left; whoever holds the folder's lock."""
    for name in ("samples.jsonl", "results.json"):
        for file in folder.glob(f".{name}-*"):
            file.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Makes the folder and a file in it, before hours of work.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(path: Path, error: OSError) -> StorageError:
    """Returns what a user should read where a file of the results cannot be written."""
    kept = "every finished cell has its results.json; the same command goes on with the others"
    return errors.unwritable(path, error, option="--output_dir", kept=kept)


def read_result(file: Path) -> dict[str, Any]:
    """Reads a results.json.

    Raises:
        ConfigError: It is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read", why=str(error), fix="--overwrite scores the set again"
        ) from None
    if not isinstance(content, dict) or "metrics" not in content:
        raise ConfigError(f"{file} holds no metrics", fix="--overwrite scores the set again")
    return content


def is_finished(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Tells whether the cell has been scored, with this identity.

    Raises:
        ConfigError: It has been scored with another checkpoint, other records or other settings.
    """
    file = folder / "results.json"
    if not file.exists():
        return False
    refuse_other_identity(file, read_result(file).get("identity", {}), identity)
    return True


def refuse_other_identity(file: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses to go on from a file of another evaluation, or to take it for this one's.

    Raises:
        ConfigError: Names what differs.
    """
    if differing := differences(dict(stored), dict(wanted)):
        raise ConfigError(
            f"{file} belongs to another evaluation",
            why="; ".join(differing),
            fix="another --output_dir, or --overwrite to score again",
        )


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample standard deviation (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def build_table(results: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """Returns Rouge-L by set and seed, with mean ± standard deviation over the seeds.

    The last row is the mean over the sets, seed by seed.
    """
    scores = {(r["set"], r["seed"]): float(r["metrics"]["rougeL"]) for r in results}
    sets = list(dict.fromkeys(name for name, _ in scores))
    seeds = list(dict.fromkeys(seed for _, seed in scores))
    table = Table(title=title)
    table.add_column("Rouge-L by seed", no_wrap=True)
    for seed in seeds:
        table.add_column(str(seed), justify="right", no_wrap=True)
    table.add_column("mean ± sd", justify="right", no_wrap=True)
    rows = {name: [scores[name, seed] for seed in seeds] for name in sets}
    if len(sets) > 1:
        rows["mean of sets"] = [
            statistics.fmean(column) for column in zip(*rows.values(), strict=True)
        ]
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in values), _spread(values))
    return table


def _spread(values: Sequence[float]) -> str:
    mean, sd = mean_and_sd(values)
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"
