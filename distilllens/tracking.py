"""Where a run's numbers go: metrics.jsonl always, the screen, and Weights & Biases on request."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from numerize.numerize import numerize
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from distilllens.config import clock
from distilllens.runs import redact

WandbMode = Literal["disabled", "offline", "online"]

logger = logging.getLogger("distilllens")

SHOWN_SCORES = ("loss", "rougeL", "exact_match", "num", "truncated", "mean_tokens")
"""Of an evaluation's numbers the screen shows these; metrics.jsonl has them all."""


class Tracker:
    """Writes metrics and speaks to the screen; on every process but the first it does nothing.

    Args:
        metrics_path: metrics.jsonl.
        log_path: log.txt, a copy of what the screen showed.
        active: Whether this is the process that writes.
        total_steps: Optimizer steps of the run.
        wandb_mode: disabled, offline or online.
        wandb_settings: ``project``, ``name``, ``dir`` and ``config`` for Weights & Biases.
        run_id: Of this run there; a resumed run has the one that it began with.
    """

    def __init__(
        self,
        metrics_path: Path,
        log_path: Path,
        *,
        active: bool,
        total_steps: int,
        wandb_mode: WandbMode = "disabled",
        wandb_settings: Mapping[str, Any] | None = None,
        run_id: str = "",
    ) -> None:
        self.active, self.total_steps, self.run_id = active, total_steps, run_id
        self.console = Console(quiet=not active)
        if not active:
            return
        self._metrics = metrics_path.open("a", encoding="utf-8")
        self._log = log_path.open("a", encoding="utf-8")
        self._log_console = Console(file=self._log, width=120, force_terminal=False)
        own = {"id": run_id, "resume": "allow"} if run_id else {}
        self._wandb = _Wandb(wandb_mode, {**(wandb_settings or {}), **own})
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._start = (time.monotonic(), 0)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
        self._wandb.finish(0 if error is None else 1)
        self._metrics.close()
        self._log.close()

    def say(self, content: RenderableType) -> None:
        """Shows a line or a table on the screen and in log.txt."""
        if self.active:
            console = self._progress.console if self._progress is not None else self.console
            # No markup, as a path may hold brackets; no wrapping, which would cut a path in two.
            console.print(content, markup=False, soft_wrap=isinstance(content, str))
            logged = redact(content) if isinstance(content, str) else content
            self._log_console.print(logged, markup=False)
            self._log.flush()

    def start(self, step: int = 0) -> None:
        """Starts the progress bar (on a terminal) and the clock of the ETA."""
        if not self.active:
            return
        self._start = (time.monotonic(), step)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("train", total=self.total_steps, completed=step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self.active and self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, metrics: Mapping[str, float], *, step: int, epoch: float) -> None:
        """Writes one line of metrics.jsonl, and shows it.

        NaN and infinities are written as such (``NaN``, ``Infinity``), never hidden.
        """
        if not self.active:
            return
        line = {"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **metrics}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        self._wandb.log(metrics, step)
        text = describe(metrics)
        plain = self._plain_line(text, step)
        if self._progress is None:
            self.console.print(plain, highlight=False, soft_wrap=True)
        else:  # above the bar, which has the time left
            self._progress.console.print(f"step {step}  {text}", highlight=False, soft_wrap=True)
        self._log.write(plain + "\n")
        self._log.flush()

    def _plain_line(self, text: str, step: int) -> str:
        seconds, first_step = time.monotonic() - self._start[0], self._start[1]
        done = step - first_step
        left = seconds / done * (self.total_steps - step) if done > 0 else math.nan
        eta = "" if math.isnan(left) else f"  left {clock(left)}"
        return f"step {step}/{self.total_steps}  {text}{eta}"


def trim_metrics(path: Path, step: int, evaluated_step: int) -> None:
    """Cuts off the lines of steps after ``step``, which a killed run wrote and this one does again.

    So it does the evaluation of ``step`` itself, if the saved state is from before that.

    Lines stand in the order of their steps, so that one cut does it: whoever has the file open to
    append goes on behind it, and a kill leaves the lines that stay as they are.
    """
    if not path.is_file():
        return
    size = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                found = json.loads(line)
                last = step if "train/loss" in found else evaluated_step
                stays = 0 < found["step"] <= last and line.endswith(b"\n")
            except (ValueError, KeyError, TypeError):
                stays = False  # half a line: the process died while writing it
            if not stays:
                break
            size += len(line)
    os.truncate(path, size)


def describe(metrics: Mapping[str, float]) -> str:
    """Returns the metrics that a reader watches, in one line."""
    parts = [
        f"{name.removeprefix('train/').removeprefix('eval/')} {metrics[name]:.4g}"
        for name in metrics
        if name.startswith("train/loss")
        or (name.startswith("eval/") and name.rpartition("/")[2] in SHOWN_SCORES)
    ]
    if "train/lr" in metrics:
        parts.append(f"lr {metrics['train/lr']:.2e}")
    if "perf/response_tokens_per_s" in metrics:
        parts.append(f"{numerize(metrics['perf/response_tokens_per_s'])} response tokens/s")
    if "perf/memory_gb" in metrics:
        parts.append(f"{metrics['perf/memory_gb']:.2f} GB")
    return "  ".join(parts)


class _Wandb:
    """Weights & Biases, if asked for; what goes wrong there is one warning, never the run's end."""

    def __init__(self, mode: WandbMode, settings: Mapping[str, Any]) -> None:
        self._run: Any = None
        if mode == "disabled":
            return
        try:
            import wandb  # takes a second, and only this choice needs it

            # Without its record of the command line, which may hold secrets; the run has its own.
            quick = wandb.Settings(init_timeout=10, x_disable_meta=True)
            self._run = wandb.init(mode=mode, settings=quick, **settings)
        except Exception as error:
            self._give_up(error)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(metrics), step=step)
        except Exception as error:
            self._give_up(error)

    def finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("wandb: %s; training goes on without it", reason)
