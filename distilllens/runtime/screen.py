"""A screen that may go away."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import TextIO, cast

NARROW = 60
"""Columns below which a progress bar says nothing; plain lines wrap."""


class SteadyStream:
    """A text stream to a screen that may go away (`… | head`, a closed terminal, a full disk).

    Then it turns to the null device: log.txt has the same lines, and a run is worth more than its
    screen. With ``NO_COLOR``, or in very few columns, it says that it is no terminal, so that all
    who ask write plain lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether bars and colours are welcome."""
        plain = bool(os.environ.get("NO_COLOR")) or get_terminal_size().columns < NARROW
        return not plain and self._stream.isatty()

    def write(self, text: str) -> int:
        """Writes, or forgets the text where nobody reads any more."""
        try:
            return self._stream.write(text)
        except OSError:
            self._turn_away()
        except UnicodeEncodeError as error:  # a screen of ASCII
            return self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes, or forgets what nobody reads any more."""
        try:
            self._stream.flush()
        except OSError:
            self._turn_away()

    def _turn_away(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextmanager
def steady_screen() -> Iterator[None]:
    """Keeps the process alive, and its files clean, where stdout or stderr are closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file opened would get the number, and others' prints
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    steady = [stream and cast(TextIO, SteadyStream(stream)) for stream in before]
    sys.stdout, sys.stderr = steady
    try:
        yield
    finally:
        for stream in filter(None, steady):
            stream.flush()
        sys.stdout, sys.stderr = before
