"""Trains by several command lines, one after the other; some are stopped on the way.

Started by torchrun from test_resume.py: ``resume_worker.py JOBS.json``, a list of objects with
``argv``, ``stop_at`` (a step, or null) and ``fault``; writes the exit codes of each rank beside it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from distilllens.runtime import distributed
from distilllens.runtime.faults import VARIABLE
from distilllens.tracking import Tracker
from train import main

ADVANCE = Tracker.advance


def do(job: dict[str, object]) -> int:
    """Does one job and returns its exit code; the last process alone gets the signal."""

    def advance(self: Tracker, step: int) -> None:
        ADVANCE(self, step)
        if step == job["stop_at"] and distributed.rank() == distributed.world_size() - 1:
            signal.raise_signal(signal.SIGTERM)

    Tracker.advance = advance  # type: ignore[method-assign]
    os.environ[VARIABLE] = str(job["fault"])
    argv = job["argv"]
    assert isinstance(argv, list)
    return main(argv)


if __name__ == "__main__":
    jobs_file = Path(sys.argv[1])
    leave, distributed.shutdown = distributed.shutdown, lambda: None  # one group for all jobs
    codes = [do(job) for job in json.loads(jobs_file.read_text())]
    jobs_file.with_name(f"codes-{distributed.rank()}.json").write_text(json.dumps(codes))
    leave()
