"""What may be published: texts without paths outside the project, and without keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from distilllens.runs import redact

PROJECT = Path(__file__).resolve().parents[1]
FILE_ADDRESS = re.compile(r"^(?i:file://)[^/\s]*")


def public_path(path: str) -> str:
    """Returns a path as it stands inside the project, else only its last part.

    A hub name, and any relative path that does not climb, stays as it is.
    """
    path = FILE_ADDRESS.sub("", path)
    climbs = ".." in PurePosixPath(path).parts
    if not path.startswith(("/", "~")) and not climbs:
        return path.rstrip("/")
    full = Path(path).expanduser().resolve()
    home = Path.home()
    # The working folder is no such root: users' names may stand below it.
    if PROJECT not in home.parents and PROJECT in full.parents:
        return full.relative_to(PROJECT).as_posix()
    return full.name if full.name and full != home else "folder"


ABSOLUTE = re.compile(r"(?:(?i:file://)[^/\s]*|(?<![\w./~]))~?/(?:[^/\s'\"\],]+/)*[^/\s'\"\],]+")
"""A path somewhere in a text: not the middle of a relative one, nor of an address (behind whose
colon stand two slashes)."""


def public_text(text: str) -> str:
    """Returns a text with all its paths as `public_path` gives them, and without keys."""
    if text.startswith(("/", "~")):
        return redact(public_path(text))
    if ".." in PurePosixPath(text).parts:
        return redact(public_path(text))
    return redact(ABSOLUTE.sub(lambda found: public_path(found[0]), text))


def public_values(value: Any) -> Any:
    """Applies `public_text` to every text of plain JSON."""
    if isinstance(value, dict):
        return {key: public_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(entry) for entry in value]
    return public_text(value) if isinstance(value, str) else value


def public_command(arguments: Sequence[str]) -> tuple[str, ...]:
    """Returns a command's arguments by `public_text`, without what tells where a training wrote.

    That is the sections run, of which the seed stays, and tracking.
    """
    kept: list[str] = []
    skips = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            beside = flag.startswith(("--run.", "--tracking.", "--debug"))
            skips = beside and flag != "--run.seed"
            if not skips:
                kept.append(f"{flag}={public_text(value)}" if equals else flag)
        elif not skips:
            kept.append(public_text(argument))
    return tuple(kept)
