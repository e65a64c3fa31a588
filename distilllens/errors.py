"""Errors that are the user's to mend, each with the exit code of its kind.

Anything else that escapes ``main`` is a bug of ours and ends with exit code 1.
"""

from __future__ import annotations

import os
from pathlib import Path

EXIT_OK = 0
EXIT_BUG = 1
EXIT_TIME_LIMIT = 75


CODE_FILE = "DISTILLLENS_CODE_FILE"
"""Variable by which a launch script names a file for the exit code: torchrun turns all into 1."""


def leave_code(code: int) -> int:
    """Writes the exit code where the launch script looks for it, on the first process."""
    if (path := os.environ.get(CODE_FILE)) and os.environ.get("RANK", "0") == "0":
        Path(path).write_text(str(code), encoding="utf-8")
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

    def __init__(self, what: str, *, why: str = "", fix: str = "", kept: str = "") -> None:
        self.what, self.why, self.fix, self.kept = what, why, fix, kept
        super().__init__(self.format())

    def format(self) -> str:
        """Returns the message as up to four short lines."""
        lines = [f"error[{self.label}]: {self.what}"]
        parts = {"why": self.why, "fix": self.fix, "kept": self.kept}
        lines += [f"  {name}: {text}" for name, text in parts.items() if text]
        return "\n".join(lines)


class ConfigError(UserError):
    """Usage, configuration, model folders, layers, tokenizers."""

    exit_code, label = 2, "DL-CONFIG"


class DataError(UserError):
    """Input records and data folders."""

    exit_code, label = 3, "DL-DATA"


class CheckpointError(UserError):
    """Saving, loading and resuming."""

    exit_code, label = 4, "DL-CHECKPOINT"


class NumericsError(UserError):
    """A loss or gradient that is not finite."""

    exit_code, label = 5, "DL-NUMERICS"


class StorageError(UserError):
    """Full disks, folders that cannot be written."""

    exit_code, label = 6, "DL-STORAGE"


class DistributedError(UserError):
    """Process groups and ranks."""

    exit_code, label = 7, "DL-DISTRIBUTED"
