"""`python -m distilllens card MODEL_FOLDER`: the model card again, with the scores so far."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from distilllens.errors import ConfigError
from distilllens.parsing import CommandParser


def card_main(argv: Sequence[str] | None = None) -> int:
    """Writes a model's card again; returns 0.

    Raises:
        ConfigError: Wrong usage, no model, or nothing that tells how it was trained.
        DataError: A damaged file.
        StorageError: The card cannot be written.
    """
    parser = CommandParser(
        prog="python -m distilllens card",
        description="Write the model card of an exported model (again): README.md, with the scores "
        "of evaluations of these very weights.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_FOLDER", type=Path, help="best/ or latest/ of a run, or an export")
    add("--eval", metavar="DIR", nargs="+", type=Path, help="folders that evaluate.py wrote; "
        "default: results/eval_main/X for a model in results/train/X")  # fmt: skip
    add("--licence", metavar="ID", help="of this model, as the hub names it: apache-2.0, mit …")
    add("--base_model", metavar="NAME", help="hub name of the student that training began with")
    add("--datasets", metavar="NAME", nargs="+", help="hub names of the training data")
    add("--language", metavar="CODE", nargs="+", help="en, de …")
    arguments = parser.parse_args(sys.argv[2:] if argv is None else list(argv))
    if arguments.licence and not re.fullmatch(r"[a-z0-9.+-]+", arguments.licence):
        raise ConfigError(f"--licence {arguments.licence!r} is no identifier, as apache-2.0")
    said = {
        "licence": arguments.licence,
        "base_model": arguments.base_model,
        "datasets": arguments.datasets and tuple(arguments.datasets),
        "language": arguments.language and tuple(arguments.language),
    }
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.commands.card import describe_card, refresh_card
    from distilllens.runtime.libraries import quiet_libraries

    quiet_libraries()
    scores = refresh_card(arguments.model, arguments.eval, said)
    print(describe_card(arguments.model, scores))
    return 0
