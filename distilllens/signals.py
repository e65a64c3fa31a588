"""Reasons to stop early: SIGTERM, SIGINT and the time limit, agreed on by all processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distilllens import distributed
from distilllens.config import parse_wall_time
from distilllens.errors import EXIT_TIME_LIMIT, UserError

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Stopped(UserError):
    """The run was asked to stop, and saved before it did."""

    label = "DL-STOPPED"

    def __init__(self, what: str, *, code: int, fix: str) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = code


class StopRequest:
    """Collects requests to stop; a signal handler only sets a flag.

    Args:
        max_wall_time: HH:MM:SS from now, or None.
        resume_command: What the user types to go on.
    """

    def __init__(self, max_wall_time: str | None = None, resume_command: str = "") -> None:
        self.deadline = None
        if max_wall_time is not None:
            self.deadline = time.monotonic() + parse_wall_time(max_wall_time)
        self.resume_command = resume_command
        self.received = 0
        self.code = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes over SIGTERM and SIGINT for a while; a second SIGINT ends the process at once."""
        before = {number: signal.signal(number, self._receive) for number in CAUGHT}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = number

    def _code(self) -> int:
        if self.received:
            return 128 + self.received
        if self.deadline is not None and time.monotonic() > self.deadline:
            return EXIT_TIME_LIMIT
        return 0

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all of them get the same answer.

        The processes' hosts agree among themselves: no GPU is waited for.
        """
        self.code = distributed.max_over_hosts(self._code())
        return self.code != 0

    def error(self, step: int) -> Stopped:
        """Returns what ends the run."""
        reason = {
            EXIT_TIME_LIMIT: "time limit",
            128 + signal.SIGINT: "SIGINT",
            128 + signal.SIGTERM: "SIGTERM",
        }[self.code]
        return Stopped(
            f"{reason}: saved step {step}",
            code=self.code,
            fix=f"resume with: {self.resume_command}",
        )
