"""Runs commands side by side: screens in files, signals handed on, failures told."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from distilllens.config import clock
from distilllens.errors import CODE_FILE, EXIT_INTERRUPTED, EXIT_TIME_LIMIT, StorageError

HANDED_ON = (signal.SIGTERM, signal.SIGINT)
STOPPED = (EXIT_TIME_LIMIT, EXIT_INTERRUPTED, 128 + signal.SIGTERM)
"""Codes of a command that was asked to stop, and saved."""
POLL_S = 0.1
TAIL_BYTES = 4000

OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torchrun tells a process who it is."""
GPUS = "CUDA_VISIBLE_DEVICES"
"""Variable by which a process is told which GPUs it may see: numbers or names, by commas."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command to run."""

    label: str
    command: tuple[str, ...]
    screen: Path
    """File for what it prints; written anew each time."""
    prepared: Path | None = None
    """Appears when the job has made what the others will share; until then it runs alone."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A job that did not come to its end."""

    label: str
    code: int
    text: str
    """The error as it stood on the job's screen."""
    log: Path


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    """Among the jobs at the same time; it has GPUs of its own."""
    start: float
    code_file: Path
    """Where it writes its own exit code, which torchrun would turn into 1."""


class Runner:
    """Runs jobs; a failed one does not keep the others from running.

    Args:
        parallel: Jobs at the same time.
        processes: Of each job, among which it shares its cores; each has a GPU of its own, if the
            machine has any: ``parallel`` × ``processes`` of them.
        fail_fast: End at the first failure; jobs under way are asked to save.
        console: Gets a line at the start and end of each job.
    """

    def __init__(self, *, parallel: int, processes: int, fail_fast: bool, console: Console) -> None:
        self.parallel, self.fail_fast, self.console = parallel, fail_fast, console
        self.failures: list[Failure] = []
        self.stop_code = 0
        """Why no more jobs start: a signal, a job's time limit; 0: they do."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, (cores or 1) // (parallel * processes))
        # Threads that wait must sleep: where cores are shared, spinning doubles the time of a step.
        wanted = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        # A sweep may itself stand in a process group, which is none of its children's.
        self._environment = wanted | {n: v for n, v in os.environ.items() if n not in OF_A_GROUP}
        gpus = visible_gpus()
        self._gpus = [gpus[slot * processes : (slot + 1) * processes] for slot in range(parallel)]
        self._unsent: list[int] = []
        self._running: list[_Running] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over; only the main thread can."""
        before = {number: signal.signal(number, self._receive) for number in HANDED_ON}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.stop_code = 128 + number
        self._unsent.append(number)

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs jobs to their ends, as many at once as are wanted; call it inside `listening`.

        Raises:
            StorageError: The file of a job's screen cannot be written.
        """
        waiting, ended, seconds = list(jobs), 0, 0.0
        is_prepared = not jobs or jobs[0].prepared is None
        with ExitStack() as stack:
            live = None
            if self.console.is_terminal:
                live = stack.enter_context(
                    Live(console=self.console, transient=True, auto_refresh=False)
                )
            stack.callback(self._end_all)
            while self._running or (waiting and not self.is_over):
                self._hand_on()
                room = self.parallel if is_prepared else 1
                while waiting and len(self._running) < room and not self.is_over:
                    number = len(jobs) - len(waiting) + 1
                    self._start(waiting.pop(0), f"{number}/{len(jobs)}")
                time.sleep(POLL_S)
                first = jobs[0].prepared
                for done in [run for run in self._running if run.process.poll() is not None]:
                    self._running.remove(done)
                    ended, seconds = ended + 1, seconds + time.monotonic() - done.start
                    left = len(waiting) + len(self._running)
                    self._end(done, eta=seconds / ended * left / self.parallel if left else None)
                is_prepared = is_prepared or ended > 0 or (first is not None and first.exists())
                if live is not None:
                    live.update(self._last_lines(), refresh=True)

    @property
    def is_over(self) -> bool:
        """Whether no more jobs start."""
        return bool(self.stop_code or (self.fail_fast and self.failures))

    def _start(self, job: Job, position: str) -> None:
        code_file = job.screen.with_suffix(".code")
        slot = min(set(range(self.parallel)) - {run.slot for run in self._running})
        own = {GPUS: ",".join(self._gpus[slot])} if self._gpus[slot] else {}
        try:
            job.screen.parent.mkdir(parents=True, exist_ok=True)
            code_file.unlink(missing_ok=True)
            with job.screen.open("wb") as screen:
                # In a group of its own, as Ctrl-C would else reach it twice, which means: at once.
                process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=screen,
                    stderr=subprocess.STDOUT,
                    env=self._environment | own | {CODE_FILE: str(code_file.resolve())},
                    process_group=0,
                )
        except OSError as error:
            raise StorageError(
                f"{job.label} cannot start", why=str(error), fix="choose another --output_dir"
            ) from None
        self._running.append(_Running(job, process, slot, time.monotonic(), code_file))
        self._say(f"[{position}] {job.label}: started")

    def _end(self, run: _Running, *, eta: float | None) -> None:
        job, code, was_over = run.job, self._exit_code(run), self.is_over
        took = f"{job.label}: %s after {clock(time.monotonic() - run.start)}"
        later = "" if eta is None else f", about {clock(eta)} left"
        if code == 0:
            self._say(f"{took % 'finished'}{later}")
        elif code in STOPPED:
            self.stop_code = self.stop_code or code
            self._say(took % f"stopped (code {code}), and goes on with the same command,")
        else:
            text = error_text(job.screen)
            self.failures.append(Failure(label=job.label, code=code, text=text, log=job.screen))
            self._say(f"{took % f'failed with code {code}'}{later}; log: {job.screen}\n{text}")
        if self.is_over and not was_over:
            self._send(signal.SIGTERM)

    def _exit_code(self, run: _Running) -> int:
        """Returns the job's own exit code; 128 + the signal where one killed it."""
        code = run.process.returncode
        try:
            told = run.code_file.read_text(encoding="utf-8")
        except OSError:
            told = ""
        run.code_file.unlink(missing_ok=True)
        if code == 0:
            return 0
        return int(told) if told.isdigit() else (128 - code if code < 0 else code)

    def _hand_on(self) -> None:
        """Sends what this process was sent, once each: a second SIGINT ends a training at once."""
        while self._unsent:
            number = self._unsent.pop(0)
            self._say(f"{signal.Signals(number).name}: handed on; what runs now saves and ends")
            self._send(number)

    def _send(self, number: int) -> None:
        for run in self._running:
            run.process.send_signal(number)

    def _end_all(self) -> None:
        """Leaves no job behind where this process fails."""
        self._send(signal.SIGTERM)
        for run in self._running:
            run.process.wait()
        self._running.clear()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _last_lines(self) -> Text:
        lines = [f"{run.job.label}: {last_line(run.job.screen)}" for run in self._running]
        return Text("\n".join(lines), style="dim", no_wrap=True, overflow="ellipsis")


def visible_gpus() -> list[str]:
    """Returns what `GPUS` calls the GPUs that this process sees; none on a machine without any."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(GPUS, "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def _tail(path: Path) -> list[str]:
    """Returns the last lines of a file that may not be there, without the empty ones."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def last_line(screen: Path) -> str:
    """Returns the last line that a job printed."""
    lines = _tail(screen)
    return lines[-1].strip() if lines else "starting …"


def error_text(screen: Path) -> str:
    """Returns the last error that a job printed, or its last lines where it printed none."""
    lines = _tail(screen)
    starts = [i for i, line in enumerate(lines) if "error[DL-" in line]
    if not starts:
        return "\n".join(lines[-5:])
    end = starts[-1] + 1
    while end < len(lines) and lines[end].startswith("  "):
        end += 1
    return "\n".join(lines[starts[-1] : end])
