"""`python -m distilllens export RUN --to DIR`: the model of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distilllens.parsing import CommandParser


def export_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0.

    Raises:
        UserError: Wrong usage; as `choose_state` and `export_state`.
    """
    parser = CommandParser(
        prog="python -m distilllens export",
        description="Write the student of a checkpoint as a Hugging Face folder: whatever the ZeRO "
        "stage and the number of processes, adapters merged, in the precision that was trained.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="RUN/state/step-N, or RUN for its newest good state"
    )
    parser.add_argument("--to", required=True, type=Path, help="folder of the model, a new one")
    arguments = parser.parse_args(argv)
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.publish.export import choose_state, export_state
    from distilllens.runtime.manifest import read_manifest

    state = choose_state(arguments.checkpoint)
    export_state(state, arguments.to)
    print(f"{arguments.to}: the student of {state}, step {read_manifest(state)['step']}")
    return 0
