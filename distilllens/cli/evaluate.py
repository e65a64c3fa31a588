"""`python evaluate.py …`, the same as `python -m distilllens evaluate …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distilllens.cli.ending import end_command
from distilllens.config import EvaluateConfig, load_evaluate_config
from distilllens.errors import EXIT_OK, asks_for_debug
from distilllens.runtime.screen import steady_screen


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Scores as the arguments say (default: those of the process); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config: EvaluateConfig | None = None
    with steady_screen():
        try:
            config = load_evaluate_config(arguments)
            # Late: torch and transformers take seconds, which help and typos need not wait for.
            from distilllens.evaluation.command import evaluate

            evaluate(config)
        except (Exception, KeyboardInterrupt) as error:
            debug = asks_for_debug(arguments) if config is None else config.debug
            anew = " without --overwrite" if config is not None and config.overwrite else ""
            goes_on = f"the same command{anew} goes on with what is not finished"
            return end_command(error, debug=debug, interrupted=goes_on)
    return EXIT_OK
