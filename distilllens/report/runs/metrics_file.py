"""metrics.jsonl, read whole or as it grows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilllens.errors import DataError

MetricsLine = Mapping[str, Any]

KEPT = 256
"""Bytes before the place read up to that must still stand there when the file has grown."""


def read_metrics(path: Path) -> list[MetricsLine]:
    """Reads metrics.jsonl.

    A last line without newline that is no JSON is what a killed run leaves; it is left out. Of
    several lines of one step and kind of metrics (a run that was resumed) the last one counts.

    Returns:
        One mapping for each step and kind of line, in order of steps; empty without a file.

    Raises:
        DataError: Another line is not a JSON object with a whole "step", or a metric is no number.
    """
    metrics = MetricsFile(path)
    metrics.update()
    return metrics.lines


class MetricsFile:
    """The lines of one metrics.jsonl; `update` reads only what was appended.

    A file that was cut or written anew (a resumed run trims its own) is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[MetricsLine] = []
        """One mapping for each step and kind of line, in order of steps."""
        self.bytes_read = 0
        """Of all updates together."""
        self._seen: tuple[int, int, int] | None = None
        self._forget()

    def _forget(self) -> None:
        self._offset, self._number, self._before = 0, 0, b""
        self._whole: dict[tuple[int, bool], MetricsLine] = {}

    def update(self) -> bool:
        """Reads what is new; returns whether there was any.

        Raises:
            DataError: A line that ended is malformed; the next call meets it again.
        """
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if seen == self._seen:
                    return False
                file.seek(self._offset - len(self._before))
                new = file.read()
                if not new.startswith(self._before):
                    self._forget()
                    file.seek(0)
                    new = file.read()
                new = new[len(self._before) :]
        except FileNotFoundError:
            seen, new = None, b""
            self._forget()
        self.bytes_read += len(new)
        self._add(new)
        self._seen = seen
        return True

    def _add(self, new: bytes) -> None:
        *ended, last = new.split(b"\n")
        added: dict[tuple[int, bool], MetricsLine] = {}
        for number, raw in enumerate(ended, start=self._number + 1):
            if not raw.strip():
                continue
            try:
                line = _parse(raw)
            except ValueError as error:
                raise DataError(
                    f"{self.path}:{number}: {error}",
                    why="each line of metrics.jsonl is one JSON object with numbers, and a step",
                    fix="remove the line",
                ) from None
            added[_key(line)] = line
        size = len(new) - len(last)
        self._offset += size
        self._number += len(ended)
        self._before = (self._before + new[:size])[-KEPT:]
        self._whole |= added
        lines = dict(self._whole)
        try:  # it has no newline yet: it is read again, and counts if it is whole already
            line = _parse(last)
            lines[_key(line)] = line
        except ValueError:
            pass
        self.lines = [lines[key] for key in sorted(lines)]


def _key(line: MetricsLine) -> tuple[int, bool]:
    """Returns the step of a line, and whether it is of a dev evaluation."""
    return int(line["step"]), any(key.startswith("eval/") for key in line)


def _parse(raw: bytes) -> MetricsLine:
    """Returns a line as a mapping; ValueError says what is wrong with it."""
    try:
        line = json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from None
    if not isinstance(line, dict):
        raise ValueError(f"expected a JSON object, got {type(line).__name__}")
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"step={step!r} is not a whole number")
    for key, value in line.items():
        plotted = key.startswith(("train/", "eval/", "perf/"))
        if plotted and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            raise ValueError(f"{key}={value!r} is not a number")
    return {key: value for key, value in line.items() if value is not None}
