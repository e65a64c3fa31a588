"""``python -m distilllens doctor [RUN]``: what a run would find on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distilllens.errors import EXIT_OK, ConfigError
from distilllens.parsing import CommandParser
from distilllens.runtime.faults import VARIABLE
from distilllens.runtime.screen import steady_screen


def doctor_main(argv: Sequence[str]) -> int:
    """Runs the command; 0 when there is no problem, else 2."""
    parser = CommandParser(
        prog="python -m distilllens doctor",
        description="Looks at software, devices, data and runs; ends with 2 if there is a problem.",
    )
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder, to look at it too")
    parser.add_argument("--online", action="store_true", help="also ask the Hugging Face hub")
    parser.add_argument(
        "--list-fault-points", action="store_true", help=f"names for {VARIABLE}, then end"
    )
    options = parser.parse_args(list(argv))
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.commands.doctor import examine, list_fault_points, show

    with steady_screen():
        console = Console(highlight=False)
        if options.list_fault_points:
            list_fault_points(console)
            return EXIT_OK
        findings = list(examine(options.run, online=options.online))
        show(findings, console)
    return ConfigError.exit_code if any(f.verdict == "problem" for f in findings) else EXIT_OK
