"""Errors that are the user's to mend, each with the exit code of its kind.

Anything else that escapes ``main`` is a bug of ours and ends with exit code 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_BUG = 1
EXIT_TIME_LIMIT = 75
EXIT_INTERRUPTED = 130


CODE_FILE = "DISTILLLENS_CODE_FILE"
"""Variable by which a launch script names a file for the exit code: torchrun turns all into 1."""


def is_first_here() -> bool:
    """Whether this is the first process of its machine, which speaks for all that happens alike."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def leave_code(code: int, *, alone: bool = False) -> int:
    """Writes the exit code where a machine's launch script looks for it.

    The first process of a machine does, and one that failed ``alone``: what ends the others is no
    more than its consequence, so the code that stands there first stays.
    """
    if (path := os.environ.get(CODE_FILE)) and (alone or is_first_here()):
        file = Path(path)
        if not file.is_file() or not file.read_text(encoding="utf-8").strip():
            file.write_text(str(code), encoding="utf-8")
    return code


class UserError(ValueError):
    """An error with four parts: what happened, why, how to fix it, what was kept.

    Args:
        what: One line, with the offending value, file and line number.
        why: The reason, where it is not plain from ``what``.
        fix: The exact flag or command that mends it.
        kept: What of the run is safe, for example the last good checkpoint.
    """

    exit_code = EXIT_BUG
    label = "DL-BUG"
    everywhere = False
    """Whether all processes meet it alike, so that the first of a machine should tell it."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", kept: str = "") -> None:
        self.what, self.why, self.fix, self.kept = what, why, fix, kept
        super().__init__(self.format())

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets an error travel to other processes, whatever its class is made from."""
        return _rebuild, (type(self), self.__dict__)

    def format(self) -> str:
        """Returns the message as up to four short lines."""
        lines = [f"error[{self.label}]: {self.what}"]
        parts = {"why": self.why, "fix": self.fix, "kept": self.kept}
        lines += [f"  {name}: {text}" for name, text in parts.items() if text]
        return "\n".join(lines)


def _rebuild(kind: type[UserError], values: dict[str, Any]) -> UserError:
    error = kind.__new__(kind)
    error.__dict__.update(values)
    error.args = (error.format(),)
    return error


class ConfigError(UserError):
    """Usage, configuration, model folders, layers, tokenizers."""

    exit_code, label = 2, "DL-CONFIG"
    everywhere = True


class DataError(UserError):
    """Input records and data folders."""

    exit_code, label = 3, "DL-DATA"
    everywhere = True


class CheckpointError(UserError):
    """Saving, loading and resuming."""

    exit_code, label = 4, "DL-CHECKPOINT"
    everywhere = True


class NumericsError(UserError):
    """A loss or gradient that is not finite."""

    exit_code, label = 5, "DL-NUMERICS"
    everywhere = True


class StorageError(UserError):
    """Full disks, folders that cannot be written."""

    exit_code, label = 6, "DL-STORAGE"


class DistributedError(UserError):
    """Process groups and ranks."""

    exit_code, label = 7, "DL-DISTRIBUTED"


def as_user_error(error: Exception, trace: str = "--debug shows the traceback") -> UserError:
    """Returns the error itself, or what a user should read of a bug of ours."""
    if isinstance(error, UserError):
        return error
    return UserError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", fix=trace)


def asks_for_debug(arguments: Sequence[str]) -> bool:
    """Whether ``--debug`` is among arguments and not false; they may be broken otherwise."""
    asks = False
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == "--debug":
            asks = following.lower() != "false"
        elif argument.startswith("--debug="):
            asks = argument.lower() != "--debug=false"
    return asks


def unwritable(path: Path, error: Exception, *, option: str, kept: str) -> StorageError:
    """Returns what a user should read where a command's file or folder cannot be written.

    Args:
        path: Of it.
        error: Of the system, or of a library that hides it.
        option: That names another place, as --output_dir.
        kept: What is safe.
    """
    told = (error.strerror if isinstance(error, OSError) else "") or str(error).partition("\n")[0]
    return StorageError(
        f"cannot write {path}",
        why=told or type(error).__name__,
        fix=f"free the disk, or choose another {option}",
        kept=kept,
    )
