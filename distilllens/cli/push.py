"""`python -m distilllens push MODEL_FOLDER REPO_ID`: an exported model goes to the hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distilllens.parsing import CommandParser

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push_main(argv: Sequence[str] | None = None, *, api: HfApi | None = None) -> int:
    """Checks a model's folder, tells what goes where, and sends it; returns 0.

    Args:
        argv: Arguments after ``push``; default: those of the process.
        api: Of the hub; default: the one that ``HF_ENDPOINT`` and ``HF_TOKEN`` say.

    Raises:
        UserError: Wrong usage, or as `push`.
    """
    parser = CommandParser(
        prog="python -m distilllens push",
        description="Upload an exported model to the Hugging Face hub. The token is that of "
        "HF_TOKEN, or of `hf auth login`. After a stop the same command goes on.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_FOLDER", type=Path, help="best/ of a run, or an export")
    add("repo_id", metavar="REPO_ID", help="USER_OR_ORGANISATION/NAME; made if it is not there")
    add("--private", action="store_true", help="make a private repository")
    add("--revision", metavar="BRANCH", help="branch to write to; made if it is not there")
    add("--message", metavar="TEXT", default="Upload with DistillLens", help="of the commit")
    add("--dry_run", action="store_true", help="check and tell all, upload nothing")
    add("--allow_unknown_licence", action="store_true", help="upload although the card's licence "
        "is unknown")  # fmt: skip
    arguments = parser.parse_args(sys.argv[2:] if argv is None else list(argv))
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.commands.push import push

    push(
        arguments.model,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        message=arguments.message,
        dry_run=arguments.dry_run,
        allow_unknown_licence=arguments.allow_unknown_licence,
        api=api,
    )
    return 0
