"""``python -m distilllens report RUN… [--eval DIR…] [--out DIR] [--data FILE] …``"""

from __future__ import annotations

from collections.abc import Sequence

from distilllens.report.arguments import parse_report_arguments


def report_main(argv: Sequence[str] | None = None) -> int:
    """Reports as the arguments say; returns 0.

    Raises:
        UserError: Wrong usage, or as `report`.
        KeyboardInterrupt: Ctrl-C; a watched page was written as it stands.
    """
    arguments = parse_report_arguments(argv)
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.report.command import report

    report(arguments)
    return 0
