"""Work cut into shards, each whole on the disk when it is done: a stopped command does the rest.

All shards of a folder carry the key of what they are of, so that nothing else is mixed in. A
receipt, written last, says that all are there; it goes before anything in the folder changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilllens.errors import ConfigError, StorageError, unwritable


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Consecutive items ``first`` … ``stop - 1``, and the rows that they come to together."""

    number: int
    first: int
    stop: int
    rows: int


def cut_shards(row_counts: Sequence[int] | np.ndarray, most_rows: int) -> list[Shard]:
    """Cuts items of so many rows each into shards of at most ``most_rows``, or of one item.

    The cut depends on what comes before it only: more items change the last shard at most.
    """
    ends = np.cumsum(row_counts)
    shards: list[Shard] = []
    first = done = 0
    while first < len(row_counts):
        stop = max(first + 1, int(np.searchsorted(ends, done + most_rows, side="right")))
        rows = int(ends[stop - 1]) - done
        shards.append(Shard(number=len(shards), first=first, stop=stop, rows=rows))
        first, done = stop, done + rows
    return shards


def check_same_key(
    option: str, folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], *, fix: str
) -> None:
    """Refuses to go on with shards of something else.

    Args:
        option: That names the folder, as data.generated.
        folder: Of the shards.
        stored: Key of what is there.
        wanted: Key of this run.
        fix: What to do instead.

    Raises:
        ConfigError: Names each part that differs, with both values.
    """
    different = [
        f"{name} {_short(stored.get(name))}, this run has {_short(wanted.get(name))}"
        for name in dict.fromkeys([*wanted, *stored])
        if stored.get(name) != wanted.get(name)
    ]
    if different:
        raise ConfigError(
            f"{option}={folder} was made with {'; '.join(different)}",
            fix=fix,
            kept="everything in it is untouched",
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def open_folder(option: str, folder: Path, receipt: Path) -> None:
    """Makes the folder of shards, and takes away the receipt that is about to be wrong.

    Raises:
        StorageError: It cannot be written.
    """
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        receipt.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable_shard(option, folder, error) from None


def unwritable_shard(option: str, path: Path, error: Exception) -> StorageError:
    """Returns what a user should read where a file of such a folder cannot be written."""
    kept = "finished shards; the same command goes on with the others"
    return unwritable(path, error, option=f"--{option}", kept=kept)


def shards_missing(option: str, folder: Path) -> StorageError:
    """Returns what a user should read where shards of other processes are not there."""
    return StorageError(
        f"{option}={folder} lacks shards that other processes wrote",
        why="all processes must see the same folder",
    )
