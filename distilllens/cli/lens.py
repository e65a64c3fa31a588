"""``python -m distilllens lens --teacher A --student B [--before C] --data FILE …``"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distilllens.report.lens.arguments import parse_lens_arguments


def lens_main(argv: Sequence[str] | None = None) -> int:
    """Writes the lens report as the arguments say (default: those of the process); returns 0.

    Raises:
        UserError: Wrong usage, or as `write_lens_report`.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_lens_arguments(options)
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.report.lens.command import write_lens_report

    write_lens_report(arguments, options)
    return 0
