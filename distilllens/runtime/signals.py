"""What reaches a run from outside: requests to stop or to save.

A handler only sets a flag. Loops look at it once a batch: `StopRequest.agreed` and
`StopRequest.check` where all processes come by equally often, `poll` where one works alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

from distilllens.config import parse_wall_time
from distilllens.errors import EXIT_TIME_LIMIT, ConfigError, UserError, leave_code
from distilllens.runtime import distributed

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAVE_CODE = 1
"""What stands for "save and go on" among the exit codes; below all of them, so a stop wins."""
SLURM_END = "SLURM_JOB_END_TIME"
"""Variable with the second (of the Unix clock) at which Slurm kills the job."""
SLURM_MARGIN = 180.0
"""Seconds kept before that end for the step under way and the save."""


class Stopped(UserError):
    """The run was asked to stop, and kept what it had before it did."""

    label = "DL-STOPPED"
    everywhere = True

    def __init__(self, what: str, *, code: int, fix: str = "the same command goes on") -> None:
        super().__init__(what, fix=fix)
        self.exit_code = code


class Request(IntEnum):
    """What a run is asked to do; NONE is false."""

    NONE = 0
    SAVE = 1
    """Save, then go on."""
    STOP = 2
    """Save, then end."""


class StopRequest:
    """Collects requests: SIGTERM, SIGINT, a time limit (stop); SIGUSR1, a file (save and go on).

    Args:
        max_wall_time: HH:MM:SS from now, or None. Slurm's end time, where there is one, limits too.
        resume_command: What the user types to go on.
        save_file: Its appearance asks for a save; the first process looks for it.

    Raises:
        ConfigError: A time that is none.
    """

    def __init__(
        self,
        max_wall_time: str | None = None,
        resume_command: str = "",
        save_file: Path | None = None,
    ) -> None:
        self.resume_command, self.save_file = resume_command, save_file
        limits = [(time.monotonic() + slurm_seconds_left(), "Slurm's end time")]
        if max_wall_time is not None:
            limits.append((time.monotonic() + parse_wall_time(max_wall_time), "time limit"))
        self.deadline, self.limit = min(limits)
        self.received = 0
        self.save_asked = False
        self.code = 0
        self.last_asked = time.monotonic()
        """When this process last came by: its sign of life."""
        self.before_abort: Callable[[], None] | None = None
        """Called when a second SIGINT ends the process."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over for a while; a second SIGINT ends the process at once, with 130.

        Only the main thread can.
        """
        global _listener
        outer, _listener = _listener, self
        before = {number: signal.signal(number, self._receive) for number in CAUGHT}
        try:
            with self._watched():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _listener = outer

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_asked = True
        else:
            self.received = number

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Hands every signal to a thread too: handlers do not run while Python waits in C code.

        That is where a run hangs whose other processes are gone, and where Ctrl-C is pressed twice.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.write(write_end, b"\0")  # no signal has this number: it ends the thread
            watcher.join()
            os.close(read_end)
            os.close(write_end)

    def _watch(self, read_end: int) -> None:
        interrupts = 0
        while number := os.read(read_end, 1)[0]:
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                self._abort()

    def _abort(self) -> None:
        code = 128 + signal.SIGINT
        with suppress(Exception):  # nothing may keep the process from its end
            if self.before_abort is not None:
                self.before_abort()
            leave_code(code)
            if distributed.is_main():
                told = f"\nSIGINT twice: ended without saving; resume with: {self.resume_command}\n"
                os.write(2, told.encode())
        os._exit(code)

    def _code(self) -> int:
        if self.received:
            return 128 + self.received
        if time.monotonic() > self.deadline:
            return EXIT_TIME_LIMIT
        if self.save_asked or self._finds_save_file():
            return SAVE_CODE
        return 0

    def _finds_save_file(self) -> bool:
        return self.save_file is not None and distributed.is_main() and self.save_file.exists()

    def agreed(self) -> Request:
        """Returns what any process was asked for; all get the same answer, and all must ask.

        A request to save stands until `saved`, one to stop for good. The processes' hosts agree
        among themselves: no GPU is waited for.
        """
        self.code = distributed.max_over_hosts(self._code())
        self.alive()
        if self.code == SAVE_CODE:
            return Request.SAVE
        return Request.STOP if self.code else Request.NONE

    def alive(self) -> None:
        """Says that this process gets on, after work that asks for nothing meanwhile."""
        self.last_asked = time.monotonic()

    def check(self, doing: str) -> None:
        """Ends what all processes are doing together, if any of them was asked to stop.

        Raises:
            Stopped: On all of them, at the same place; nothing is saved yet.
        """
        if self.agreed() is Request.STOP:
            raise self._stopped(f"stopped while {doing}")

    def poll(self, doing: str) -> None:
        """Ends what this process does alone, if it got a signal to stop.

        A time limit does not end it: what it has done would be lost, and may yet be done in time.

        Raises:
            Stopped: It did; nothing is saved.
        """
        self.alive()
        if self.received:
            self.code = 128 + self.received
            raise self._stopped(f"stopped while {doing}")

    def saved(self, step: int) -> str:
        """Forgets a request to save, which is done; returns a line about it."""
        self.save_asked = False
        if self.save_file is not None and distributed.is_main():
            try:
                self.save_file.unlink(missing_ok=True)
            except OSError as error:
                ignored, self.save_file = self.save_file, None
                return f"saved step {step}; {ignored} cannot be removed ({error}): ignored from now"
        return f"saved step {step}, as asked"

    def error(self, step: int) -> Stopped:
        """Returns what ends the run after `agreed` said so and ``step`` was saved."""
        return self._stopped(f"saved step {step}")

    def _stopped(self, what: str) -> Stopped:
        by_time = self.code == EXIT_TIME_LIMIT
        reason = self.limit if by_time else signal.Signals(self.code - 128).name
        fix = f"resume with: {self.resume_command}" if self.resume_command else ""
        return Stopped(f"{reason}: {what}", code=self.code, fix=fix or "the same command goes on")


_listener: StopRequest | None = None
"""The one that has the signals: they are the process's, so is this."""


def poll(doing: str) -> None:
    """Ends a loop of this process alone, if whoever listens got a signal to stop.

    Args:
        doing: Completes "stopped while …".

    Raises:
        Stopped: It did.
    """
    if _listener is not None:
        _listener.poll(doing)


@contextmanager
def stoppable() -> Iterator[None]:
    """Makes signals end a loop at its next `poll`, where nobody listens to them yet."""
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with StopRequest().listening():
        yield


def slurm_seconds_left() -> float:
    """Returns the seconds until a run must end for Slurm's sake; infinity without Slurm.

    Raises:
        ConfigError: The variable holds no number.
    """
    text = os.environ.get(SLURM_END, "")
    try:
        return float(text) - time.time() - SLURM_MARGIN if text else float("inf")
    except ValueError:
        raise ConfigError(
            f"{SLURM_END}={text!r} is no number of seconds", fix=f"unset {SLURM_END}"
        ) from None
