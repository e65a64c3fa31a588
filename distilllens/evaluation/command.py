"""What evaluate.py does: test sets, or tasks of lm-eval."""

from __future__ import annotations

from distilllens.config import EvaluateConfig
from distilllens.evaluation.harness import run_harness
from distilllens.evaluation.protocol import evaluate_checkpoint
from distilllens.runtime.signals import Stopped


def evaluate(config: EvaluateConfig) -> None:
    """Scores a model as the configuration says.

    Raises:
        UserError: As `evaluate_checkpoint` and `run_harness`.
    """
    run = evaluate_checkpoint if config.harness is None else run_harness
    try:
        run(config)
    except Stopped as stopped:
        if config.overwrite:  # which would begin with the first answer again
            stopped.fix = "the same command without --overwrite goes on with what is not finished"
        raise
