"""A process that shows no sign of life is given up, and only that."""

from __future__ import annotations

import time

from distilllens.runtime.watchdog import watching


def test_silence_is_noticed_once() -> None:
    calls: list[float] = []
    begin = time.monotonic()
    with watching(0.2, lambda: begin, lambda: calls.append(time.monotonic() - begin)):
        time.sleep(0.8)
    assert len(calls) == 1 and calls[0] >= 0.2


def test_signs_of_life_are_seen() -> None:
    calls: list[int] = []
    with watching(0.5, time.monotonic, lambda: calls.append(1)):
        time.sleep(1.2)
    assert calls == []
