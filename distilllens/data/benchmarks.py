"""The evaluation sets: the five of the paper by name, and any folder that holds a valid.jsonl."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Literal

from distilllens.data.records import Record, read_records
from distilllens.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

BENCHMARKS: dict[str, tuple[str, int | None]] = {
    "dolly": ("dolly/valid.jsonl", None),
    "self_inst": ("self_inst/valid.jsonl", None),
    "vicuna": ("vicuna/valid.jsonl", None),
    "sinst": ("sinst/11_/valid.jsonl", None),
    "uinst": ("uinst/11_/valid.jsonl", 10_000),
}
"""Name → file below the data folder, and how many records the protocol uses (None: all).
The folders ``11_`` hold the tasks whose references have 11 tokens or more."""


def load_benchmark(
    name: str,
    *,
    data_dir: str | Path,
    limit: int | Literal["all"] | None = None,
    bad_lines: Literal["error", "skip"] = "error",
) -> list[Record]:
    """Loads an evaluation set with all its references.

    Args:
        name: A key of `BENCHMARKS`, or the name of a folder of ``data_dir`` with a valid.jsonl.
        data_dir: Folder that holds the sets.
        limit: The first N records, or all; None: the protocol's number.
        bad_lines: As in `read_records`.

    Raises:
        ConfigError: A name that is no plain folder name; a limit below 1.
        DataError: No such set (names what is there), or what `read_records` finds wrong.
    """
    path = benchmark_path(name, data_dir=data_dir)
    if isinstance(limit, int) and limit < 1:
        raise ConfigError(f"limit={limit} must be ≥ 1, or all")
    if not path.is_file():
        there = ", ".join(available_benchmarks(data_dir)) or "none"
        raise DataError(
            f"evaluation set {name}: no file {path}",
            why=f"sets in {data_dir}: {there}",
            fix="fetch the published sets with prepare --download, or put the file there",
        )
    file = read_records(path, bad_lines=bad_lines, references="many")
    if file.broken:
        logger.warning(
            "%s: %d broken lines skipped, first %s", path, file.num_skipped, file.problems[0]
        )
    return file.records[: max_records(name, limit)]


def max_records(name: str, limit: int | Literal["all"] | None) -> int | None:
    """Returns how many records of a set an evaluation with this limit uses; None: all it has."""
    if limit is None and name in BENCHMARKS:
        return BENCHMARKS[name][1]
    return None if limit == "all" else limit


def benchmark_path(name: str, *, data_dir: str | Path) -> Path:
    """Returns the file of a set; it need not exist.

    Raises:
        ConfigError: A name that could leave ``data_dir`` or the results folder named after it.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}", name):
        raise ConfigError(
            f"evaluation set {name[:120]!r} is no plain name",
            why="it also names a results folder: letters, digits and _ . + - only, at most 100",
        )
    relative = BENCHMARKS[name][0] if name in BENCHMARKS else f"{name}/valid.jsonl"
    return Path(data_dir) / relative


def available_benchmarks(data_dir: str | Path) -> list[str]:
    """Returns the names, sorted, under which `load_benchmark` finds a file."""
    folder = Path(data_dir)
    own = {path.parent.name for path in folder.glob("*/valid.jsonl")}
    published = {name for name, (file, _) in BENCHMARKS.items() if (folder / file).is_file()}
    return sorted(own | published)
