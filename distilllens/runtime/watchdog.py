"""Ends a process that waits for others for ever: nothing in a collective would.

Process groups have a time limit of their own, but not all that libraries make obey it, and with
NCCL it ends a process without a word. So a thread looks at the clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watching(
    seconds: float, last_sign: Callable[[], float], give_up: Callable[[], None]
) -> Iterator[None]:
    """Calls ``give_up`` from a thread if there is no sign of life for a while.

    Args:
        seconds: How long (> 0).
        last_sign: Returns the `time.monotonic` of the last step, batch or the like.
        give_up: Tells the user, and ends the process.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(seconds / 4, 10.0)):
            if time.monotonic() - last_sign() > seconds:
                give_up()
                return

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
