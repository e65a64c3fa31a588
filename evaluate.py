"""Scores a checkpoint: `python evaluate.py --config FILE … --section.key value …`.

Several processes share the work: `torchrun --nproc_per_node 4 evaluate.py …`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from distilllens.config import load_evaluate_config
from distilllens.errors import (
    EXIT_BUG,
    EXIT_OK,
    CheckpointError,
    ConfigError,
    DataError,
    UserError,
    leave_code,
)
from distilllens.evaluation.protocol import evaluate_checkpoint
from distilllens.signals import steady_screen

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the evaluation and returns the exit code of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with steady_screen():
        return _evaluate(arguments)


def _evaluate(arguments: list[str]) -> int:
    try:
        evaluate_checkpoint(load_evaluate_config(arguments))
    except UserError as error:
        # Wrong input is the same for all ranks: one says it. Other errors are a rank's own.
        everywhere = isinstance(error, (ConfigError, DataError, CheckpointError))
        if not everywhere or os.environ.get("RANK", "0") == "0":
            _show(error.format(), arguments)
        return leave_code(error.exit_code)
    except KeyboardInterrupt:
        _show("interrupted; the same command goes on with what is not finished", arguments)
        return leave_code(EXIT_INTERRUPTED)
    except Exception as error:
        what = str(error).partition("\n")[0]
        bug = UserError(f"{type(error).__name__}: {what}", fix="--debug shows the traceback")
        _show(bug.format(), arguments)
        return leave_code(EXIT_BUG)
    return EXIT_OK


def _show(message: str, arguments: Sequence[str]) -> None:
    if any(argument.startswith("--debug") for argument in arguments):
        traceback.print_exc()
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
