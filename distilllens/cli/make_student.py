"""`python -m distilllens make-student`: a smaller student out of a teacher's own blocks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from numerize.numerize import numerize
from rich.console import Console

from distilllens.parsing import CommandParser


def make_student_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = CommandParser(
        prog="python -m distilllens make-student",
        description="Make a student of a teacher's own blocks.",
    )
    parser.add_argument("--teacher", required=True, help="model folder (or hub name)")
    parser.add_argument(
        "--layers", required=True, type=_numbers, help="blocks to keep, from 1: 1,4,7,10"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the student")
    arguments = parser.parse_args(argv)
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.commands.make_student import write_student

    teacher_size, student_size = write_student(arguments.teacher, arguments.layers, arguments.out)
    Console().print(
        f"{arguments.out}: {len(arguments.layers)} blocks, {numerize(student_size)} of the "
        f"teacher's {numerize(teacher_size)} parameters",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,4,7") from None
