"""`python train.py --config FILE … --section.key value …`, or under torchrun."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distilllens.cli.ending import end_command
from distilllens.config import load_config
from distilllens.errors import asks_for_debug
from distilllens.runtime.screen import steady_screen


def train_main(argv: Sequence[str] | None = None) -> int:
    """Trains as the arguments say (default: those of the process); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with steady_screen():
        try:
            config = load_config(arguments)
            # Late: torch and transformers take seconds, which help and typos need not wait for.
            from distilllens.session import train
        except (Exception, KeyboardInterrupt) as error:
            debug = asks_for_debug(arguments)
            return end_command(error, debug=debug, interrupted="the same command starts again")
        return train(config, arguments)
