"""Folders that are whole or are not there: manifests, verification, replacing and deleting.

A committed folder holds ``manifest.json``: size and SHA-256 of every other file, what the folder is
of, and a digest of the manifest itself. It is written last; then one rename gives the folder its
name. What is called ``.tmp-…`` is not whole; what is called ``.old-…`` waits for its successor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from distilllens.errors import CheckpointError
from distilllens.runtime.faults import reach

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DRAFT, OLD = ".tmp-", ".old-"


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    size: int
    """In bytes."""
    sha256: str


class HashedFile:
    """A new file that is hashed while it is written, and on the disk when the block ends.

    Args:
        path: Of the file.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._digest, self._size = path.open("xb"), hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        """Appends bytes; returns how many."""
        self._digest.update(data)
        written = self._file.write(data)
        self._size += written
        return written

    def flush(self) -> None:
        """Hands to the system what is still held back here."""
        self._file.flush()

    def record(self) -> FileRecord:
        """Returns size and hash of what was written so far."""
        return FileRecord(self._size, self._digest.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def write_hashed(path: Path, content: bytes) -> FileRecord:
    """Writes a new file and forces it to the disk."""
    with HashedFile(path) as file:
        file.write(content)
    return file.record()


def hash_file(path: Path) -> FileRecord:
    """Reads a file for its size and hash; one that was just written comes from memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def hash_folder(folder: Path) -> dict[str, FileRecord]:
    """Returns `hash_file` of everything in a folder, by its path in it."""
    return {name: hash_file(folder / name) for name in sorted(_file_names(folder))}


def sync(path: Path) -> None:
    """Forces a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Forces a folder and everything in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _file_names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


# --- Manifests ----------------------------------------------------------------------------------


def write_manifest(folder: Path, files: Mapping[str, FileRecord], facts: dict[str, Any]) -> None:
    """Writes a folder's manifest, its last file.

    Args:
        folder: A draft.
        files: Every file in it, by its path in it.
        facts: Plain JSON: what the folder is of.
    """
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, **facts}
    content["files"] = {name: files[name]._asdict() for name in sorted(files)}
    content["manifest_sha256"] = _own_digest(content)
    write_hashed(folder / MANIFEST, json.dumps(content, indent=2).encode())
    sync_tree(folder)


def _own_digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a folder's manifest.

    Raises:
        CheckpointError: It is missing, damaged, or of a later version of this program.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["manifest_sha256"] != _own_digest(content):
            raise ValueError("sha256 differs")
        version = content["format_version"]
        if not all(type(r["size"]) is int for r in content["files"].values()):
            raise ValueError("a size is no number")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged", why=str(error).partition("\n")[0]) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this program reads {FORMAT_VERSION}",
            fix="use the version of the program that wrote it",
        )
    assert isinstance(content, dict)
    return content


def find_damage(folder: Path) -> str:
    """Compares a folder with its manifest, every byte; returns the first difference, or ``""``."""
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError as error:
        return error.what + (f" ({error.why})" if error.why else "")
    present = _file_names(folder) - {MANIFEST}
    if missing := sorted(files.keys() - present):
        return f"{folder / missing[0]} is missing"
    if unknown := sorted(present - files.keys()):
        return f"{folder / unknown[0]} is not in the manifest"
    for name, expected in files.items():
        path = folder / name
        try:
            if (size := path.stat().st_size) != expected["size"]:
                return f"{path} has {size:,} of {expected['size']:,} bytes"
            if hash_file(path).sha256 != expected.get("sha256"):
                return f"{path}: sha256 differs"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return ""


# --- Committed states ---------------------------------------------------------------------------


def saved_states(folder: Path) -> list[Path]:
    """Returns the folders ``step-N`` that have a manifest, by N; their bytes are not looked at."""
    return [path for path in step_folders(folder) if (path / MANIFEST).is_file()]


def newest_good_state(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Verifies the folders ``step-N``, the newest first, until one is good.

    Returns:
        That one, or None; and the newer ones with what is wrong with them.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(step_folders(folder)):
        if not (damage := find_damage(path)):
            return path, damaged
        damaged[path] = damage
    return None, damaged


def step_folders(folder: Path) -> list[Path]:
    """Returns all folders ``step-N`` by N, also what a deletion that died has left of one."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def delete_state(folder: Path) -> None:
    """Deletes a state, or what is left of one; at no moment does a part pass for the whole."""
    reach("delete.before")
    (folder / MANIFEST).unlink(missing_ok=True)
    reach("delete.after_manifest")
    doomed = folder.with_name(f"{DRAFT}{folder.name}-deleted")
    os.rename(folder, doomed)
    reach("delete.after_rename")
    shutil.rmtree(doomed)
    reach("delete.after")


# --- Replacing ----------------------------------------------------------------------------------


def draft_folder(folder: Path) -> Path:
    """Returns where to write what is to become ``folder``."""
    return folder.with_name(f"{DRAFT}{folder.name}-{os.getpid()}")


def replace_folder(draft: Path, folder: Path) -> None:
    """Puts ``draft`` in the place of ``folder``, forced to the disk.

    Two renames, as no system swaps folders in one; `clean_leftovers` mends what a death between
    them leaves.
    """
    sync_tree(draft)
    old = folder.with_name(f"{OLD}{folder.name}-{os.getpid()}")
    reach("replace.before")
    if folder.exists():
        os.rename(folder, old)
    try:
        reach("replace.between")
        os.rename(draft, folder)
    except Exception:
        if old.exists():
            os.rename(old, folder)
        raise
    sync(folder.parent)
    reach("replace.after")
    shutil.rmtree(old, ignore_errors=True)


def clean_leftovers(folder: Path) -> list[str]:
    """Removes what a process that died left half done in a folder; returns what was done."""
    done = []
    for path in sorted(folder.glob(f"{OLD}*")):
        place = folder / path.name.removeprefix(OLD).rpartition("-")[0]
        if not place.exists():
            os.rename(path, place)
            done.append(f"{place} is back: its successor was never put in place")
        else:
            _remove(path)
            done.append(f"{path} is removed")
    for path in sorted(folder.glob(f"{DRAFT}*")):
        _remove(path)
        done.append(f"{path} is removed")
    return done


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # another process's probe of the folder: it is gone by itself
