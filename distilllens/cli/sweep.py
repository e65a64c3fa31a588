"""``python -m distilllens sweep FILE [--dry_run] [--section.key value …]``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distilllens.parsing import CommandParser

EPILOG = (
    "Further flags (--section.key value) go to every training, after all else. The same command "
    "goes on where a sweep was stopped, and skips what is finished."
)


def sweep_main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep of a file; returns the code of `run_sweep`.

    Raises:
        UserError: Wrong usage, or as `run_sweep`.
    """
    parser = CommandParser(
        prog="python -m distilllens sweep",
        description="Compares methods with equal budgets over several training seeds.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="sweep file; configs/sweeps/ has some")
    add(
        "--dry_run",
        action="store_true",
        help="check options and what is stored, print every command, start nothing; models and "
        "data need not be there",
    )
    add("--table_only", action="store_true", help="write the table of what is there, start nothing")
    add(
        "--overwrite_scores",
        action="store_true",
        help="score anew what is scored in part, with other settings or with other weights",
    )
    add("--fail_fast", action="store_true", help="end at the first training that fails")
    add("--output_dir", metavar="DIR", type=Path, help="instead of the sweep file's")
    add("--processes", metavar="N", type=int, help="of one training, instead of the sweep file's: "
        "one for each GPU; optim.accumulation makes up for fewer")  # fmt: skip
    add(
        "--parallel",
        metavar="N",
        type=int,
        help="trainings at the same time, instead of the file's",
    )
    arguments, extra = parser.parse_known_args(argv)
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.sweep.command import run_sweep

    return run_sweep(arguments, extra)
