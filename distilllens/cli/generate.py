"""`python -m distilllens generate`: the teacher's answers to the training prompts."""

from __future__ import annotations

from collections.abc import Sequence

from distilllens.config import load_config
from distilllens.errors import EXIT_OK
from distilllens.runs import shown_command

ABOUT = (
    "Sample the teacher's answers to the training prompts, to train on. Takes the options of that "
    "training and reads its model (the teacher), data, generate and eval.dev_size; writes "
    "raw.jsonl and generation.json into data.generated."
)


def generate_main(argv: Sequence[str]) -> int:
    """Generates as the arguments say; returns 0.

    Raises:
        UserError: As `load_config` and `generate`.
    """
    config = load_config(argv, prog="python -m distilllens generate", about=ABOUT)
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.commands.generate import generate
    from distilllens.evaluation.protocol import process_group
    from distilllens.runtime.libraries import quiet_libraries
    from distilllens.runtime.signals import StopRequest

    quiet_libraries()
    command = shown_command(["python", "-m", "distilllens", "generate", *argv])
    stop = StopRequest(resume_command=command)
    with stop.listening(), process_group():
        generate(config, stop)
    return EXIT_OK
