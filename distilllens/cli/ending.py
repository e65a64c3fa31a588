"""How a command ends: told on the screen, without secrets, and as an exit code."""

from __future__ import annotations

import sys
import traceback

from distilllens.errors import EXIT_INTERRUPTED, as_user_error, is_first_here, leave_code
from distilllens.runs import redact


def end_command(error: Exception | KeyboardInterrupt, *, debug: bool, interrupted: str) -> int:
    """Tells the user on the screen how a command ended, and returns the exit code.

    Args:
        error: What was raised; called while it is handled.
        debug: Show the traceback too.
        interrupted: What the same command will do, told after Ctrl-C.
    """
    if debug:
        traceback.print_exc()
    if isinstance(error, KeyboardInterrupt):
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return leave_code(EXIT_INTERRUPTED)
    told = as_user_error(error)
    if not told.everywhere or is_first_here():
        print(redact(told.format()), file=sys.stderr, flush=True)
    return leave_code(told.exit_code, alone=not told.everywhere)
