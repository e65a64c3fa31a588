"""Errors that travel from one process to another keep what they are and say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from distilllens.errors import (
    CheckpointError,
    DataError,
    UserError,
    asks_for_debug,
    unwritable,
)
from distilllens.runtime.signals import Stopped


@pytest.mark.parametrize(
    "error",
    [
        DataError("a.jsonl:4: broken", why="why", fix="fix", kept="kept"),
        CheckpointError("gone"),
        Stopped("SIGTERM: stopped while tokenising", code=143, fix="again"),
    ],
)
def test_an_error_survives_the_way(error: UserError) -> None:
    error.everywhere = False
    arrived = copy.deepcopy(error)  # by the same method as pickle
    assert type(arrived) is type(error) and str(arrived) == str(error)
    assert arrived.exit_code == error.exit_code and arrived.__dict__ == error.__dict__


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("I/O error: full\nand more"), "I/O error: full"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_cannot_be_written_is_named_with_the_reason(error: Exception, why: str) -> None:
    told = unwritable(Path("a/b"), error, option="--out", kept="all else")
    assert told.what == "cannot write a/b" and told.why == why and told.exit_code == 6
    assert told.fix.endswith("another --out") and told.kept == "all else"


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        ("", False),
        ("--debug", True),
        ("--debug --limit 0", True),
        ("--limit 0 --debug true", True),
        ("--debug=TRUE", True),
        ("--debug false", False),
        ("--debug False --limit 0", False),
        ("--debug=false", False),
        ("--debug --debug=false", False),
        ("--debugger", False),
    ],
)
def test_a_traceback_is_shown_where_it_is_asked_for(line: str, asks: bool) -> None:
    assert asks_for_debug(line.split()) == asks
