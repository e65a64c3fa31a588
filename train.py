"""Trains a student: `python train.py --config FILE … --section.key value …`, or under torchrun."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distilllens.cli.train import train_main


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the arguments say (default: those of the process); returns the exit code."""
    return train_main(argv)


if __name__ == "__main__":
    sys.exit(main())
