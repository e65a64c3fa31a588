"""The command that scores a checkpoint: evaluate.py or ``python -m distilllens evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distilllens.config import EvaluateConfig, load_evaluate_config
from distilllens.errors import EXIT_OK, asks_for_debug, end_command
from distilllens.evaluation.harness import run_harness
from distilllens.evaluation.protocol import evaluate_checkpoint
from distilllens.runtime.signals import Stopped, steady_screen


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Runs the evaluation and returns the exit code of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with steady_screen():
        return _evaluate(arguments)


def _evaluate(arguments: list[str]) -> int:
    goes_on = "the same command goes on with what is not finished"
    config: EvaluateConfig | None = None
    try:
        config = load_evaluate_config(arguments)
        run = evaluate_checkpoint if config.harness is None else run_harness
        run(config)
    except (Exception, KeyboardInterrupt) as error:
        if config is not None and config.overwrite:
            goes_on = goes_on.replace("command", "command without --overwrite")
            if isinstance(error, Stopped):
                error.fix = goes_on
        debug = asks_for_debug(arguments) if config is None else config.debug
        return end_command(error, debug=debug, interrupted=goes_on)
    return EXIT_OK
