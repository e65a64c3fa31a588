"""The seam for faults: inert without the variable, exact with it, and all its points are real."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distilllens.errors import ConfigError
from distilllens.runtime import faults
from distilllens.runtime.faults import POINTS, VARIABLE, InjectedFault, parse_faults, reach

PACKAGE = Path(faults.__file__).parents[1]


def test_points_and_places_are_the_same() -> None:
    places = [
        name
        for path in PACKAGE.rglob("*.py")
        if path.name != "faults.py"
        for name in re.findall(r'reach\(\s*"([^"]+)"', path.read_text(encoding="utf-8"))
    ]
    assert set(places) == set(POINTS)
    assert all(text and text == text.strip() for text in POINTS.values())


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert [reach(point, step=3) for point in POINTS] == [False] * len(POINTS)


@pytest.mark.parametrize(
    ("text", "step", "rank", "happens"),
    [
        ("save.start=RAISE", 5, "0", True),
        ("save.start@5=RAISE", 5, "0", True),
        ("save.start@5=RAISE", 6, "0", False),
        ("save.start@5=RAISE", None, "0", False),
        ("save.start#1=RAISE", 5, "1", True),
        ("save.start#1=RAISE", 5, "0", False),
        ("save.start@5#1=RAISE", 5, "1", True),
        ("save.start@5#1=RAISE", 5, "11", False),
        ("save.end=RAISE", 5, "0", False),
        ("save.end=RAISE, save.start@5=RAISE", 5, "0", True),
        ("", 5, "0", False),
    ],
)
def test_a_fault_happens_at_its_point_step_and_rank(
    text: str, step: int | None, rank: str, happens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    monkeypatch.setenv("RANK", rank)
    if happens:
        with pytest.raises(InjectedFault, match=r"injected at save\.start"):
            reach("save.start", step=step)
    else:
        assert reach("save.start", step=step) is False


def test_errors_nan_and_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENOSPC", "EIO"):
        monkeypatch.setenv(VARIABLE, f"save.end={name}")
        with pytest.raises(OSError) as caught:
            reach("save.end")
        assert caught.value.errno == getattr(errno, name)
    monkeypatch.setenv(VARIABLE, "step.loss@2=NAN")
    assert [reach("step.loss", step=step) for step in (1, 2, 3)] == [False, True, False]
    monkeypatch.setenv(VARIABLE, "save.end=SLEEP:0.05")
    start = time.monotonic()
    assert reach("save.end") is False and time.monotonic() - start >= 0.05


@pytest.mark.parametrize(("action", "code"), [("KILL", -9), ("EXIT0", 0)])
def test_the_process_ends(action: str, code: int) -> None:
    program = "from distilllens.runtime.faults import reach; reach('save.end'); raise SystemExit(3)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, VARIABLE: f"save.end={action}", "PYTHONPATH": str(PACKAGE.parent)},
        timeout=60,
    )
    assert done.returncode == code


@pytest.mark.parametrize(
    "text",
    [
        *("save.strat=KILL", "KILL", "save.start", "save.start=", "save.start=kill"),
        *("save.start=SLEEP", "save.start=KILL:3", "save.start@x=KILL", "save.start#=KILL"),
        "save.start=KILL;save.end=KILL",
    ],
)
def test_what_is_not_understood_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=VARIABLE):
        reach("save.end")


def test_fields() -> None:
    (fault,) = parse_faults(" save.after_state@20#1=SLEEP:1.5 ")
    assert (fault.point, fault.step, fault.rank) == ("save.after_state", 20, 1)
    assert (fault.action, fault.seconds) == ("SLEEP", 1.5)
