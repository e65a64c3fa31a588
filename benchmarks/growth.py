"""How time and memory grow with one quantity: the options, and the picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.harness import Parser, Result
from distilllens.errors import ConfigError
from distilllens.report.style import DPI, LIGHT, themed


def add_growth_options(parser: Parser, quantities: Sequence[str]) -> None:
    """Adds ``--growth`` and ``--plot``."""
    add = parser.add_argument
    add("--growth", choices=quantities, help="instead: our own variant over sizes of one quantity")
    add("--plot", type=Path, help="with --growth: PNG or SVG file of the two curves")


def check_growth_options(arguments: argparse.Namespace) -> None:
    """Refuses a plot without growth.

    Raises:
        ConfigError: Wrong usage.
    """
    plot = arguments.plot
    if plot is not None and (not arguments.growth or plot.suffix not in (".png", ".svg")):
        raise ConfigError("--plot needs --growth and a name that ends in .png or .svg")


def save_growth(
    path: Path, label: str, values: Sequence[int], results: Sequence[Result], console: Console
) -> None:
    """Draws the results over the values of one quantity and tells where the picture is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_growth(label, values, results).savefig(path, dpi=DPI)
    console.print(f"plot: {path}", soft_wrap=True, highlight=False)


def plot_growth(label: str, values: Sequence[int], results: Sequence[Result]) -> Figure:
    """Draws time (median, from shortest to longest) and extra memory over one quantity."""
    color = LIGHT.series[0]
    with themed(LIGHT):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        time_axes, memory_axes = figure.subplots(1, 2)
        time_axes.fill_between(
            values,
            [result.wall_min_s for result in results],
            [result.wall_max_s for result in results],
            color=color,
            alpha=0.2,
        )
        time_axes.plot(values, [result.wall_s for result in results], marker="o", color=color)
        time_axes.set_title("Time, s")
        memory = [result.extra_mb for result in results]
        if None in memory:
            memory_axes.text(0.5, 0.5, "not measured here", ha="center")
        else:
            memory_axes.plot(values, memory, marker="o", color=color)
        memory_axes.set_title("Peak extra memory, MB")
        for axes in (time_axes, memory_axes):
            axes.set_xlabel(label)
            axes.set_ylim(bottom=0)
        return figure
