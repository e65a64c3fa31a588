"""``report --watch``: follows runs under way, on the screen and in a page that renews itself.

A look at the runs costs a few system calls and what was appended to their metrics.jsonl. The page
is written only after something changed (a file, or a run that fell silent), only figures with new
values are drawn, and the pauses between two pages are at least nine times as long as the work on
the last one, so that watching takes no more than a tenth of one core beside the training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

from distilllens.config import TrainConfig
from distilllens.errors import UserError
from distilllens.report.html import Drawings
from distilllens.report.runs.metrics_file import MetricsFile
from distilllens.report.runs.progress import (
    HEADER,
    Progress,
    progress_of,
    progress_table,
    waiting_for,
)
from distilllens.report.runs.record import (
    CONFIG,
    METRICS,
    RunRecord,
    read_config,
    read_run,
    with_labels,
)
from distilllens.report.tables import MISSING

REST = 9.0
"""Pause after a page, in CPU times of writing it."""
PAGE_SECONDS = 2.0
"""The page loads itself again no more often than this, however often the runs are looked at."""
SMALL_FILES = (CONFIG, "status.json", "layers.json", "environment.json", "data.json")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a page of runs under way is made from."""

    runs: Sequence[RunRecord]
    """Those that can be read."""
    waiting: Sequence[Progress]
    """The others."""
    drawings: Drawings
    """Keeps figures from page to page."""
    live_seconds: float | None
    """How often the page should load itself again; None: it is the last one."""


class Follower:
    """One run's folder, which may not be there yet; `look` reads what is new in it.

    Attributes:
        record: The run as last read; None before the first time.
        problem: Why it cannot be read at the moment; empty if it can.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: RunRecord | None = None
        self.problem = ""
        self.metrics = MetricsFile(folder / METRICS)
        self._config: TrainConfig | None = None
        self._stamps: list[tuple[int, int] | None] = []

    def look(self) -> bool:
        """Reads what changed since the last look; returns whether there is anything new to show."""
        record, problem = self.record, self.problem
        try:
            self.problem = self._missing() or self._read()
        except UserError as error:
            self.problem = error.what
        except OSError as error:
            self.problem = f"{error.filename}: {error.strerror}"
        return (record, problem) != (self.record, self.problem)

    def _missing(self) -> str:
        if not self.folder.is_dir():
            return "no such folder yet"
        return "" if (self.folder / CONFIG).is_file() else f"no {CONFIG} in it yet"

    def _read(self) -> str:
        stamps = [_stamp(self.folder / name) for name in SMALL_FILES]
        is_new = self.metrics.update()
        if self._config is None or stamps[0] != self._stamps[0]:
            self._config = read_config(self.folder)
        # After a problem all is read again: the look that met it did not get to the end.
        if is_new or self.problem or stamps != self._stamps:
            self.record = read_run(self.folder, self._config, self.metrics.lines)
        self._stamps = stamps
        return ""


def watch_runs(
    folders: Sequence[Path],
    *,
    seconds: float,
    write: Callable[[Watched], None],
    console: Console,
) -> None:
    """Follows runs until the status.json of each says that it has ended.

    Args:
        folders: Of the runs; one that is not there yet, or cannot be read, is waited for.
        seconds: Between two looks.
        write: Writes the page.
        console: A table on a terminal; elsewhere a line for each step that was logged.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the page was written as one that stays as it is.
    """
    followers = [Follower(folder) for folder in folders]
    drawings = Drawings(png=False)
    is_due, rest_until = True, 0.0
    shown: list[list[str]] = []
    with _screen(console) as show:
        try:
            while True:
                looks = [follower.look() for follower in followers]
                watched = _watched(followers, drawings, max(seconds, PAGE_SECONDS))
                rows = [*(progress_of(run) for run in watched.runs), *watched.waiting]
                show(rows)
                # Time alone changes what a row says: of a silent run no file changes.
                cells = [row.cells() for row in rows]
                is_due = is_due or any(looks) or cells != shown
                shown = cells
                if all(row.has_ended for row in rows):
                    return
                if is_due and time.monotonic() >= rest_until:
                    start = time.process_time()
                    write(watched)
                    rest_until = time.monotonic() + REST * (time.process_time() - start)
                    is_due = False
                time.sleep(seconds)
        except KeyboardInterrupt:
            write(_watched(followers, drawings, None))
            raise


def _watched(followers: Sequence[Follower], drawings: Drawings, seconds: float | None) -> Watched:
    records = {f.folder: f.record for f in followers if f.record is not None}
    return Watched(
        runs=with_labels(list(records.values())),
        waiting=[waiting_for(f.folder, f.problem) for f in followers if f.problem],
        drawings=drawings,
        live_seconds=seconds,
    )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size


@contextmanager
def _screen(console: Console) -> Iterator[Callable[[Sequence[Progress]], None]]:
    """Yields what shows the rows: a table that stays in place, or lines without a terminal."""
    if not console.is_terminal:
        yield _Lines(console).show
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda rows: live.update(
            progress_table(rows, title="Watching; Ctrl-C ends it"), refresh=True
        )


class _Lines:
    """Prints a line for each row that is not what it was."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.shown: dict[str, tuple[str, int]] = {}

    def show(self, rows: Sequence[Progress]) -> None:
        for row in rows:
            seen = (row.problem or row.state, row.step)
            if self.shown.get(row.label) != seen:
                self.shown[row.label] = seen
                self.console.print(_line(row), markup=False, highlight=False, soft_wrap=True)


def _line(row: Progress) -> str:
    if row.problem:
        return f"waiting for {row.label}: {row.problem}"
    label, state, *rest = row.cells()
    named = zip(HEADER[2:], rest, strict=True)
    told = [f"{name} {value}" for name, value in named if value != MISSING]
    return "  ".join([label, state, *told])
