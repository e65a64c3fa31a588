"""`python -m distilllens COMMAND …`, installed as `distilllens`."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

from distilllens.errors import EXIT_BUG, UserError, leave_code

EXIT_INTERRUPTED = 130

COMMANDS = {
    "prepare": ("distilllens.data.prepare", "prepare_main", "tokenise records, or download them"),
    "skills": ("distilllens.quickstart", "skills_main", "write the embedded data set and models"),
    "make-student": (
        "distilllens.make_student",
        "make_student_main",
        "cut a student out of a teacher",
    ),
    "cache-teacher": (
        "distilllens.cache_teacher",
        "cache_teacher_main",
        "store the teacher's hidden states once, for trainings that then read them",
    ),
    "export": ("distilllens.export", "export_main", "write the model of a checkpoint"),
    "doctor": ("distilllens.doctor", "doctor_main", "look at software, devices, data and runs"),
    "report": ("distilllens.report.command", "report_main", "tables, curves and lens maps of runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m distilllens COMMAND …\n\ncommands (each has --help):")
        for name, (_, _, text) in COMMANDS.items():
            print(f"  {name:14s}{text}")
        print("\ntraining and evaluation: python train.py --help, python evaluate.py --help")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"error[DL-CONFIG]: unknown command {arguments[0]!r}", file=sys.stderr)
        print(f"  fix: one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    name, *rest = arguments
    module, function, _ = COMMANDS[name]
    # Shown here, but for the command whose options have a --debug of their own.
    debug = "--debug" in rest and name != "cache-teacher"
    rest = [argument for argument in rest if not (debug and argument == "--debug")]
    try:  # imported late: torch takes seconds, help should not
        return int(getattr(importlib.import_module(module), function)(rest))
    except UserError as error:
        return _end(error, error.exit_code, debug=debug)
    except KeyboardInterrupt:
        print("interrupted; the same command starts again", file=sys.stderr)
        return leave_code(EXIT_INTERRUPTED)
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return _end(UserError(what, fix="--debug shows the traceback"), EXIT_BUG, debug=debug)


def _end(error: UserError, code: int, *, debug: bool) -> int:
    """Tells the user and returns the exit code."""
    if debug:
        traceback.print_exc()
    print(error.format(), file=sys.stderr)
    return leave_code(code)


if __name__ == "__main__":
    sys.exit(main())
