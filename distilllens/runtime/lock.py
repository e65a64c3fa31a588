"""One run at a time in a run's folder: a lock that dies with its owner.

The lock is the kernel's (``flock``) on RUN/run.lock, so nothing is left to clean when a process is
killed; the file's JSON only says whose it is. It is emptied when the lock is given back: words
that stand there while the lock is free are those of an owner that was killed.

On network file systems: NFS (Linux ≥ 2.6.12) and Lustre mounted with ``flock`` lock across
machines. Mounted with ``local_lock`` or ``localflock`` they lock only against processes of the
same machine: two machines can then write into one folder. Where the file system knows no locks at
all, the words in the file decide: an owner on this machine is alive if its pid is; one on another
machine counts as alive until somebody deletes the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from distilllens.errors import ConfigError, StorageError, UserError
from distilllens.runtime import distributed

NO_LOCKS_HERE = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
"""What ``flock`` says on a file system without locks."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who has, or had, a lock."""

    pid: int
    host: str
    since: str
    """Local time, ISO 8601 with the zone."""

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} since {self.since}"

    def is_gone(self) -> bool:
        """Whether its process has surely ended; of another machine's nothing is sure."""
        if self.host != socket.gethostname():
            return False
        if self.pid == os.getpid():  # a container starts each of its lives with the same pids
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # alive, of another user
        return False


@contextmanager
def locked(file: Path, option: str = "--run.output_dir") -> Iterator[str]:
    """Holds the lock of a run's folder; all processes of a run enter, the first one locks.

    Args:
        file: RUN/run.lock, made if it is not there.
        option: The flag that names the folder.

    Yields:
        A line about the killed owner that the lock was taken over from; else an empty text.

    Raises:
        ConfigError: Another run has the lock; on all processes.
        StorageError: The file cannot be opened or written; on all processes.
    """
    descriptor, note = -1, ""
    refusal: UserError | None = None
    if distributed.is_main():
        try:
            descriptor, note = _acquire(file, option)
        except UserError as error:
            refusal = error
    # Else the others would wait for a first process that has left.
    if distributed.max_over_hosts(int(refusal is not None)):
        raise refusal or ConfigError(f"{file.parent}: the first process got no lock")
    try:
        yield note
    finally:
        if descriptor >= 0:
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


def holder(file: Path) -> Owner | None:
    """Returns who has the lock now, without taking it; None if it is free or nobody says so.

    Raises:
        OSError: The file is there and cannot be opened.
    """
    if not file.is_file():
        return None
    descriptor = os.open(file, os.O_RDONLY)
    try:
        is_free, owner = _try(descriptor, fcntl.LOCK_SH)
        return None if is_free else owner
    finally:
        os.close(descriptor)


def _acquire(file: Path, option: str) -> tuple[int, str]:
    """Returns the descriptor that holds the lock, and a note if it was taken over."""
    descriptor = -1
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        is_free, owner = _try(descriptor, fcntl.LOCK_EX)
        if not is_free:
            raise ConfigError(
                f"{file.parent} is in use by {owner or 'another process'}",
                fix=f"wait for its end, stop it, or choose another {option}; if that "
                f"process is surely gone, delete {file}",
                kept="everything in it is untouched",
            )
        _write_owner(descriptor)
    except BaseException as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise StorageError(
                f"{file} cannot be locked", why=str(error), fix=f"choose another {option}"
            ) from None
        raise
    note = f"lock taken over from {owner}, which ended without a word" if owner else ""
    return descriptor, note


def _try(descriptor: int, kind: int) -> tuple[bool, Owner | None]:
    """Takes the lock, if it can be had, until the descriptor is closed; also tells its owner."""
    is_known, is_free = True, True
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        is_free = False
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        is_known = False
    owner = _read_owner(descriptor)  # only now: a free lock's file cannot change any more
    return (is_free if is_known else owner is None or owner.is_gone()), owner


def _read_owner(descriptor: int) -> Owner | None:
    """Returns the owner that the file names; None if it is empty or no record."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write_owner(descriptor: int) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    owner = Owner(pid=os.getpid(), host=socket.gethostname(), since=now)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(owner)).encode() + b"\n", 0)
