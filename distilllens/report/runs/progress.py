"""How far each run is: step, losses, speed, time left; for the page and for the screen."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.table import Table

from distilllens.config import clock
from distilllens.report.runs.record import RunRecord
from distilllens.report.tables import MISSING

ENDED = ("finished", "stopped", "failed")
"""States of status.json after which no line comes, unless the run is started again."""
RECENT = 20
"""Lines from which the speed is taken."""
PAUSE = 20
"""Times the usual distance of two lines: a longer one is a pause between two lives of a run."""
SILENCE = 120.0
"""Seconds without a line after which a running run is called silent."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One run's row."""

    label: str
    state: str
    """As in status.json; ``waiting`` where there is none yet."""
    step: int
    total: int | None
    """Steps of the whole run; None before a line tells how many an epoch has."""
    loss: float | None
    """The last train/loss."""
    dev: tuple[int, float] | None
    """Step and value of the smallest dev loss."""
    rouge: tuple[int, float] | None
    """Step and value of the largest dev Rouge-L."""
    tokens_per_s: float | None
    """Response tokens per second, the median of the last lines."""
    memory_gb: float | None
    seconds_left: float | None
    """None if it ended, or before two lines."""
    updated: float | None
    """When the last line was written, in Unix seconds."""
    problem: str = ""
    """Why nothing can be read at the moment."""

    @property
    def has_ended(self) -> bool:
        """Whether status.json says so."""
        return self.state in ENDED and not self.problem

    def state_now(self, now: float | None = None) -> str:
        """Returns the state, with how long a running one has been silent."""
        if self.problem:
            return f"waiting: {self.problem}"
        if self.state != "running" or self.updated is None:
            return self.state
        silent = (time.time() if now is None else now) - self.updated
        return f"running, silent for {_roughly(silent)}" if silent > SILENCE else "running"

    def cells(self, now: float | None = None) -> list[str]:
        """Returns the row as text, in the order of `HEADER`."""
        return [
            self.label,
            self.state_now(now),
            f"{self.step:,}" + (f" / {self.total:,}" if self.total else ""),
            _number(self.loss, ".4g"),
            f"{self.dev[1]:.4f} at {self.dev[0]:,}" if self.dev else MISSING,
            f"{self.rouge[1]:.2f} at {self.rouge[0]:,}" if self.rouge else MISSING,
            _number(self.tokens_per_s, ",.0f"),
            _number(self.memory_gb, ".2f"),
            MISSING if self.seconds_left is None else clock(self.seconds_left),
        ]


HEADER = (
    "run",
    "state",
    "step",
    "train loss",
    "best dev loss",
    "best dev Rouge-L",
    "response tokens/s",
    "memory (GB)",
    "left",
)


def waiting_for(folder: Path, problem: str) -> Progress:
    """Returns the row of a run that is not there yet, or cannot be read at the moment."""
    return Progress(
        label=str(folder),
        state="waiting",
        step=0,
        total=None,
        loss=None,
        dev=None,
        rouge=None,
        tokens_per_s=None,
        memory_gb=None,
        seconds_left=None,
        updated=None,
        problem=problem,
    )


def progress_of(run: RunRecord) -> Progress:
    """Returns how far a run is, from its metrics and its status."""
    state = str(run.status.get("state", MISSING))
    last_loss = run.last("train/loss")
    rates = run.series("perf/response_tokens_per_s")[1][-RECENT:]
    memory = run.last("perf/memory_gb")
    times = run.series("time")[1]
    total = total_steps(run)
    pace = seconds_per_step(run)
    goes_on = state not in ENDED and total is not None and pace is not None
    return Progress(
        label=run.label,
        state=state,
        step=run.num_steps,
        total=total,
        loss=last_loss[1] if last_loss else None,
        dev=run.best_dev(),
        rouge=run.best_dev("eval/dev/rougeL", largest=True),
        tokens_per_s=statistics.median(rates) if rates else None,
        memory_gb=memory[1] if memory else None,
        seconds_left=max(0, total - run.num_steps) * pace if goes_on and total and pace else None,
        updated=times[-1] if times else None,
    )


def total_steps(run: RunRecord) -> int | None:
    """Returns the steps of the whole run: given, or its epochs × the steps that an epoch has."""
    if run.config.optim.max_steps is not None:
        return run.config.optim.max_steps
    steps, epochs = run.series("epoch")
    if not epochs or not epochs[-1] > 0:
        return None
    return round(run.config.optim.epochs * round(steps[-1] / epochs[-1]))


def seconds_per_step(run: RunRecord) -> float | None:
    """Returns the time of a step lately, evaluations and saves included, pauses left out."""
    steps, times = run.series("time")
    recent = list(zip(steps, times, strict=True))[-RECENT:]
    spans = [(after - before, end - start) for (before, start), (after, end) in pairwise(recent)]
    usual = [seconds for done, seconds in spans if done > 0 and seconds > 0]
    if not usual:
        return None
    # The line of an evaluation has the step of the line before it: its time counts, without a step.
    longest = PAUSE * statistics.median(usual)
    kept = [(done, seconds) for done, seconds in spans if 0 <= seconds <= longest]
    done = sum(steps for steps, _ in kept)
    return sum(seconds for _, seconds in kept) / done if done else None


def progress_table(rows: Sequence[Progress], *, title: str) -> Table:
    """Returns the rows for a terminal."""
    table = Table(title=title, title_justify="left")
    for position, name in enumerate(HEADER):
        table.add_column(name, justify="right" if position > 1 else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.cells())
    return table


def _roughly(seconds: float) -> str:
    minutes = int(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} days"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return MISSING
    return f"{value:{form}}" if math.isfinite(value) else str(value)
