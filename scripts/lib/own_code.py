"""Prints a failed run's own exit code: the `code` of its status.json, if this very run wrote it."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def own_code(status_file: Path, begin: float, code: int) -> int:
    """Returns the code in ``status_file``, or ``code`` where no run since ``begin`` left one.

    torchrun turns every failure into 1, so its own code says nothing.
    """
    try:
        if status_file.stat().st_mtime < begin:
            return code
        status = json.loads(status_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return code
    return int(status.get("code") or code)


if __name__ == "__main__":
    print(own_code(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
