"""`python -m distilllens COMMAND …`, installed as `distilllens`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from distilllens.cli.ending import end_command
from distilllens.errors import asks_for_debug

COMMANDS = {
    "prepare": ("distilllens.cli.prepare", "prepare_main", "tokenise records, or download them"),
    "skills": (
        "distilllens.cli.skills",
        "skills_main",
        "write the embedded data set and models",
    ),
    "make-student": (
        "distilllens.cli.make_student",
        "make_student_main",
        "cut a student out of a teacher",
    ),
    "cache-teacher": (
        "distilllens.cli.cache_teacher",
        "cache_teacher_main",
        "store the teacher's hidden states once, for trainings that then read them",
    ),
    "generate": (
        "distilllens.cli.generate",
        "generate_main",
        "sample the teacher's answers to the training prompts, to train on",
    ),
    "evaluate": (
        "distilllens.cli.evaluate",
        "evaluate_main",
        "score a model on test sets; the same as evaluate.py",
    ),
    "export": ("distilllens.cli.export", "export_main", "write the model of a checkpoint"),
    "judge": (
        "distilllens.cli.judge",
        "judge_main",
        "let a language model grade the answers of an evaluation, or compare two",
    ),
    "card": (
        "distilllens.cli.card",
        "card_main",
        "write the model card, with the scores so far",
    ),
    "push": (
        "distilllens.cli.push",
        "push_main",
        "upload an exported model to the Hugging Face hub",
    ),
    "doctor": (
        "distilllens.cli.doctor",
        "doctor_main",
        "look at software, devices, data and runs",
    ),
    "sweep": ("distilllens.cli.sweep", "sweep_main", "compare methods on an equal budget"),
    "report": ("distilllens.cli.report", "report_main", "tables, curves and lens maps of runs"),
    "lens": (
        "distilllens.cli.lens",
        "lens_main",
        "what every layer of teacher and student would say, as a page",
    ),
}

OWN_DEBUG = ("cache-teacher", "generate", "evaluate", "judge")
"""Commands that have ``--debug`` among their own options."""


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
    debug = asks_for_debug(rest)
    if name not in OWN_DEBUG:
        rest = [argument for argument in rest if argument != "--debug"]
    try:
        return int(getattr(importlib.import_module(module), function)(rest))
    except (Exception, KeyboardInterrupt) as error:
        return end_command(error, debug=debug, interrupted="the same command starts again")


if __name__ == "__main__":
    sys.exit(main())
