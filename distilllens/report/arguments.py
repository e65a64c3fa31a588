"""The arguments of ``python -m distilllens report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distilllens.errors import ConfigError
from distilllens.parsing import CommandParser

WATCH_SECONDS = 5.0
EPILOG = (
    "RUN is a folder that train.py wrote. Without --eval, scores are looked for where "
    "evaluate.py puts them: results/eval_main/… for a run in results/train/…"
)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """What a report is made from; see ``--help``."""

    runs: Sequence[Path]
    eval: Sequence[Path] | None
    metrics: Sequence[str]
    baseline: str | None
    out: Path | None
    watch: float | None
    """Seconds between two looks at the runs; None: one report, now."""
    data: Path | None
    prompts: int
    tokens: int
    teacher: str | None
    device: str | None
    lens: bool
    no_lens: bool


def parse_report_arguments(argv: Sequence[str] | None) -> ReportArguments:
    """Parses and checks the arguments.

    Raises:
        ConfigError: Wrong usage.
    """
    parser = CommandParser(
        prog="python -m distilllens report",
        description="Tables, curves and lens maps of trainings and their scores, as one page.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="training run folders")
    add("--eval", metavar="DIR", nargs="+", type=Path, help="evaluation folders, in table order")
    add("--metrics", metavar="NAME", nargs="+", default=[], help="more metrics of results.json, "
        "beside rougeL and exact_match")  # fmt: skip
    add("--baseline", metavar="LABEL", help="method of the tables that the others are compared "
        "with; default: sft, else the first")  # fmt: skip
    add("--out", metavar="DIR", type=Path, help="default: report/ beside the runs")
    add("--watch", metavar="SECONDS", nargs="?", type=float, const=WATCH_SECONDS, help="follow "
        "runs under way: look at them so often (5), until they end or Ctrl-C; lens maps only at "
        "the end, and only with --lens")  # fmt: skip
    add("--data", metavar="FILE", type=Path, help="held-out JSONL of the lens maps; default: "
        "valid.jsonl of the run's data")  # fmt: skip
    add("--prompts", metavar="N", type=int, default=64, help="records of the lens maps (64)")
    add("--tokens", metavar="N", type=int, default=512, help="response tokens of them (512)")
    add("--teacher", metavar="PATH", help="teacher for the maps of runs without one; default: "
        "the teacher of the other runs")  # fmt: skip
    add("--device", metavar="D", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    lens = parser.add_mutually_exclusive_group()
    lens.add_argument(
        "--lens",
        action="store_true",
        help="draw lens maps of more than six runs, too, and stop if one cannot be drawn",
    )
    lens.add_argument("--no_lens", action="store_true", help="draw no lens maps: loads no model")
    arguments = ReportArguments(**vars(parser.parse_args(argv)))
    _check(arguments)
    return arguments


def _check(arguments: ReportArguments) -> None:
    for name, value in {"prompts": arguments.prompts, "tokens": arguments.tokens}.items():
        if value < 1:
            raise ConfigError(f"--{name} {value} must be ≥ 1")
    # Also refuses NaN, which is not ≥ anything.
    if arguments.watch is not None and not 0.2 <= arguments.watch <= 86400:
        raise ConfigError(f"--watch {arguments.watch:g} must be between 0.2 and 86400 seconds")
    if arguments.data is not None and not arguments.data.is_file():
        raise ConfigError(f"--data {arguments.data}: no such file")
