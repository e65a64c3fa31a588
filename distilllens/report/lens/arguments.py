"""The arguments of ``python -m distilllens lens``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from distilllens.errors import ConfigError
from distilllens.parsing import CommandParser

DTYPES = ("bfloat16", "float16", "float32")
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
EPILOG = """\
Writes into the --out folder: lens.html, one page with everything, that needs no network; lens.json,
all its numbers; layers.csv, divergence.csv and tokens.csv; figures/, every figure as PNG and SVG.
"""


def parse_lens_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the arguments.

    Raises:
        ConfigError: Wrong usage.
    """
    parser = CommandParser(
        prog="python -m distilllens lens",
        description="What every layer of teacher and student would say if the model stopped there.",
        epilog=EPILOG,
    )
    _add_models(parser.add_argument_group("models"))
    _add_text(parser.add_argument_group("text"))
    out = parser.add_argument_group("computation and output")
    out.add_argument("--out", metavar="DIR", type=Path, help="default: results/lens/STUDENT")
    out.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1; default: a GPU if there is one"
    )
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; "
        "probabilities are float32 always (%(default)s)")  # fmt: skip
    out.add_argument("--attention", choices=ATTENTION, default="auto", help="(%(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("prompts", "tokens", "show_tokens", "max_length", "max_prompt_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be ≥ 1")
    if arguments.show < 0:
        raise ConfigError(f"--show {arguments.show} must be ≥ 0")
    return arguments


def _add_models(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--teacher", metavar="PATH", help="Hugging Face model folder")
    add("--student", metavar="PATH", help="the trained student's")
    add("--before", metavar="PATH", help="the student before its training, for comparison")
    add("--teacher_lora", metavar="DIR", help="adapter of the teacher, merged when it is loaded")
    add("--student_lora", metavar="DIR", help="adapter of the student; exported ones are merged "
        "already")  # fmt: skip
    add("--run", metavar="RUN", type=Path, help="training run: its teacher, best/ as the student, "
        "the student it began with, its held-out data and lengths, and the layers it paired, which "
        "are framed; other options go before it")  # fmt: skip


def _add_text(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", metavar="FILE", type=Path, help="held-out records (JSON lines with instruction, "
        "input, output); of a run: valid.jsonl in its data")  # fmt: skip
    add("--prompts", metavar="N", type=int, default=64, help="records of the figures: the first N "
        "(%(default)s)")  # fmt: skip
    add("--tokens", metavar="N", type=int, default=512, help="response tokens of them, evenly "
        "spread (%(default)s)")  # fmt: skip
    add("--show", metavar="N", type=int, default=3, help="records shown token by token: the first "
        "N usable ones (%(default)s)")  # fmt: skip
    add("--show_tokens", metavar="N", type=int, default=64, help="response tokens of each: the "
        "first N (%(default)s)")  # fmt: skip
    add("--prompt", metavar="TEXT", action="append", default=[], help="an instruction of your own, "
        "shown token by token; may be given several times")  # fmt: skip
    add("--response", metavar="TEXT", action="append", default=[], help="its answer, one for each "
        "--prompt; default: a greedy answer of the teacher, or the one of --answers")  # fmt: skip
    add("--answers", choices=("reference", "teacher", "student"), default="reference", help="which "
        "answers are shown token by token: the records' references, or greedy ones of a model "
        "(%(default)s)")  # fmt: skip
    add("--max_length", metavar="N", type=int, help="longest prompt + answer in tokens, longer "
        "answers are cut (512, or the run's; never over the models' context)")  # fmt: skip
    add("--max_prompt_length", metavar="N", type=int, help="records with longer prompts in tokens "
        "are left out (256, or the run's)")  # fmt: skip
