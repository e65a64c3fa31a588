"""Several machines of one run: whether all of them see what the first process writes."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from distilllens.errors import DataError, StorageError
from distilllens.runtime import distributed


def check_shared(folder: Path) -> None:
    """Makes sure that a run's folder is the same for all its processes, which all must call this.

    Else the first save would fail, hours later.

    Raises:
        StorageError: On all of them, if one does not see what the first process writes there.
    """
    if distributed.world_size() == 1:
        return
    number = secrets.randbits(60) if distributed.is_main() else 0
    probe = folder / f".probe-{distributed.max_over_hosts(number):x}"  # a name no cache has seen
    if distributed.is_main():
        probe.touch()
    distributed.max_over_hosts(0)  # it is there now
    blind = distributed.max_over_hosts(0 if probe.exists() else distributed.rank())
    if distributed.is_main():
        probe.unlink(missing_ok=True)
    if blind:
        raise StorageError(
            f"rank {blind} does not see what rank 0 writes in {folder}",
            why="every process writes its part of a saved state there",
            fix="choose a --run.output_dir on a file system that all machines share",
            kept="nothing was written",
        )


def refuse_together(what: str, refusal: DataError | None) -> None:
    """Ends all processes if one cannot read what the first has written; all must call this.

    Args:
        what: Which the others should find, for the message.
        refusal: Why this process does not find it.

    Raises:
        DataError: On all of them.
    """
    blind = distributed.max_over_hosts(0 if refusal is None else distributed.rank())
    if not blind:
        return
    own = f"on {socket.gethostname()}: {refusal.what}" if refusal is not None else ""
    raise DataError(
        f"rank {blind} does not find {what}",
        why=own or f"its own reason is on its machine's screen and in log-rank{blind}.txt",
        fix="put --data.path and --data.processed on a file system that all machines share",
    )
