"""Answers of a cell that is not finished: kept one by one, so that a killed process loses little.

Each rank appends to a file of its own in the cell's folder, ``answers.partial.RANK.jsonl``. The
first line, and the first of each later attempt, says which evaluation it belongs to; every other
line is one answer, handed to the system as soon as it is there. A last line that was cut off by a
kill is passed over, and cut away before more is written. Whoever goes on, with whatever number of
ranks, reads all these files; they go when results.json is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distilllens.evaluation.cells.results import refuse_other_identity, unwritable
from distilllens.evaluation.generation import Answer

PATTERN = "answers.partial.*.jsonl"
FIELDS = {field.name for field in dataclasses.fields(Answer)}
"""Of an answer; one that another version wrote with others is answered again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartialAnswers:
    """What a cell's partial files hold."""

    answers: dict[int, Answer]
    """By row of the set."""
    seconds: float
    """Spent on them, the sum over ranks and over all attempts."""
    places: tuple[tuple[str, str], ...]
    """Device and dtype of those that answered, each once, sorted."""


class PartialWriter:
    """Appends this rank's answers to the cell's partial file.

    Args:
        folder: The cell's.
        rank: This process's.
        head: Plain JSON: the cell's identity and seed, the device and the dtype.

    Raises:
        StorageError: The file cannot be written; also from `append`.
    """

    def __init__(self, folder: Path, *, rank: int, head: Mapping[str, Any]) -> None:
        self.file = folder / f"answers.partial.{rank}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self.file.open("ab")
            self._stream.truncate(_whole_size(self.file))
        except OSError as error:
            raise unwritable(self.file, error) from None
        self._last = time.monotonic()
        self._write(head)

    def append(self, row: int, answer: Answer) -> None:
        """Keeps an answer; after a kill of the process it is there."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        content = {"row": row, "seconds": round(seconds, 6), "answer": dataclasses.asdict(answer)}
        self._write(content)

    def _write(self, content: Mapping[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(content).encode("ascii") + b"\n")
            self._stream.flush()
        except OSError as error:
            raise unwritable(self.file, error) from None

    def close(self) -> None:
        """Puts all on the disk; ranks of other machines may read it then."""
        try:
            with self._stream as stream:
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise unwritable(self.file, error) from None


def read_partial(folder: Path, *, identity: Mapping[str, Any], seed: int) -> PartialAnswers:
    """Reads all partial files of a cell; there may be none.

    Raises:
        ConfigError: They belong to another evaluation.
    """
    wanted = {**identity, "seed": seed}
    answers: dict[int, Answer] = {}
    seconds, places = 0.0, set()
    for file in sorted(folder.glob(PATTERN)):
        is_ours = False
        for line in _whole_lines(file):
            match line:
                case {"identity": dict(stored), "seed": where, "device": device, "dtype": dtype}:
                    refuse_other_identity(file, {**stored, "seed": where}, wanted)
                    is_ours = True
                    places.add((str(device), str(dtype)))
                case {"row": int(row), "seconds": int() | float() as spent, "answer": dict(answer)}:
                    if is_ours and answer.keys() == FIELDS:
                        answers.setdefault(row, Answer(**answer | {"ids": tuple(answer["ids"])}))
                        seconds += spent
    return PartialAnswers(answers=answers, seconds=seconds, places=tuple(sorted(places)))


def remove_partial(folder: Path) -> None:
    """Removes the cell's partial files."""
    for file in folder.glob(PATTERN):
        file.unlink(missing_ok=True)


def _whole_size(file: Path) -> int:
    """Returns the bytes up to the end of the last whole line."""
    return file.read_bytes().rfind(b"\n") + 1


def _whole_lines(file: Path) -> Iterator[Any]:
    """Yields the content of each line that is whole; what is no JSON will be answered again."""
    for line in file.read_bytes()[: _whole_size(file)].splitlines():
        with suppress(ValueError):
            yield json.loads(line)
