"""Errors that travel from one process to another keep what they are and say."""

from __future__ import annotations

import copy

import pytest

from distilllens.errors import CheckpointError, DataError, UserError, asks_for_debug
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
