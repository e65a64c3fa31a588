"""``python -m distilllens judge A [--against B] --base_url URL --model NAME …``"""

from __future__ import annotations

from collections.abc import Sequence

from distilllens.config import load_judge_config
from distilllens.errors import EXIT_OK


def judge_main(argv: Sequence[str]) -> int:
    """Judges as the arguments say; returns 0.

    Raises:
        UserError: As `load_judge_config` and `judge`.
    """
    config = load_judge_config(argv)
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.evaluation.judge.command import judge

    judge(config)
    return EXIT_OK
