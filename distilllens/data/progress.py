"""Progress of long loops: a bar with ETA on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_INTERVAL = 10.0
"""Seconds between plain lines: logs stay short, and a watcher sees life."""


@contextmanager
def track(
    verb: str,
    unit: str,
    *,
    total: int,
    console: Console,
    note: Callable[[], str] | None = None,
) -> Iterator[Callable[[int], None]]:
    """Shows how far a loop is; yields a function that takes the number of newly finished units.

    Args:
        verb: What the loop does.
        unit: What it counts.
        total: Units in all.
        console: Where to show it.
        note: Returns what else to show, as it stands at the time; default: nothing.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(verb, total=total, note="")
            yield lambda step: progress.update(task, advance=step, note=note() if note else "")
        return
    yield _plain_lines(verb, unit, total=total, console=console, note=note)


def _plain_lines(
    verb: str, unit: str, *, total: int, console: Console, note: Callable[[], str] | None
) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(step: int) -> None:
        nonlocal done, last
        done += step
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL or not 0 < done < total:
            return
        last = now
        eta = (now - started) / done * (total - done)
        told = f"{verb}: {done:,} of {total:,} {unit}, ETA {eta:.0f} s"
        console.print(f"{told}, {note()}" if note else told, highlight=False)

    return advance
