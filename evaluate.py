"""Scores a checkpoint: `python evaluate.py --config FILE … --section.key value …`.

Several processes share the work: `torchrun --nproc_per_node 4 evaluate.py …`. The same as
`python -m distilllens evaluate …`.
"""

from __future__ import annotations

import sys

from distilllens.cli.evaluate import evaluate_main as main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
