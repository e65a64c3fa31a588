"""Where reports are written: a wide screen, folders checked first, files that appear whole."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from distilllens.errors import StorageError


def wide_console() -> Console:
    """Returns a console that does not squeeze tables into 80 columns when it is a file or pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=220)


def check_writable(folder: Path) -> None:
    """Makes the folder before minutes of work, not after.

    Raises:
        StorageError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _storage_error(folder, str(error)) from None
    if not os.access(folder, os.W_OK):
        raise _storage_error(folder, "it is not writable")


def write_file(path: Path, content: bytes) -> None:
    """Writes beside the file and renames, so that no reader sees a half of it.

    Raises:
        StorageError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _storage_error(path, str(error)) from None


def _storage_error(path: Path, why: str) -> StorageError:
    return StorageError(f"cannot write {path}", why=why, fix="choose another folder with --out")
