"""Trains in children of one process that has imported everything, so that a start costs no imports.

Started by test_campaign.py. Each line of the input is an object with ``argv``, ``variables`` (of
the environment) and ``output`` (a file); the answers are two lines, the child's pid at once and its
exit code at its end (below zero: the signal). A child is to signals, files and other processes what
`python train.py` is: its own session, and ``main`` returns into the end of the interpreter.
"""

from __future__ import annotations

import json
import os
import sys

import train


def become(argv: list[str], variables: dict[str, str], output: str) -> None:
    """Makes this new child look as if a shell had started it."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, number in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, number)
    os.environ.update(variables)
    sys.argv = ["train.py", *argv]


def main() -> int:
    """Answers until the input ends; in a child, trains."""
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            become(**json.loads(line))
            return train.main()
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
