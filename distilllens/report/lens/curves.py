"""Figures of numbers per layer: one line for each model over relative depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from distilllens.report.lens.statistics import PerLayer, Statistic
from distilllens.report.style import Theme, new_axes, themed


@dataclass(frozen=True, kw_only=True)
class Line:
    """How a model's line looks: the teacher's in ink, the student's in colour, before it dashed."""

    colour: int | None
    """Number in the theme's series; None: the ink."""
    style: str
    filled: bool


LINES = {
    "teacher": Line(colour=None, style="-", filled=True),
    "student": Line(colour=0, style="-", filled=True),
    "before": Line(colour=1, style="--", filled=False),
}
"""By the model's role."""


def plot_statistic(
    statistic: Statistic,
    roles: Sequence[str],
    labels: Sequence[str],
    values: Sequence[Mapping[str, PerLayer]],
    *,
    theme: Theme,
) -> Figure:
    """Draws one statistic of all models over relative depth (100 %: the last block).

    Args:
        statistic: What to draw.
        roles: Of the models: teacher, student, before.
        labels: For the legend.
        values: Of each model, by the statistic's key.
        theme: Colours.
    """
    with themed(theme):
        figure, axes = new_axes(5.6, 3.4)
        for role, label, model in zip(roles, labels, values, strict=True):
            line = LINES[role]
            colour = theme.ink if line.colour is None else theme.series[line.colour]
            per_layer = model[statistic.key]
            axes.plot(
                np.arange(1, len(per_layer) + 1) / len(per_layer),
                per_layer,
                line.style,
                color=colour,
                marker="o",
                markersize=4,
                markerfacecolor=colour if line.filled else theme.surface,
                label=label,
                clip_on=False,
            )
        axes.set(
            title=statistic.title,
            xlabel="depth: block / number of blocks",
            ylabel=statistic.unit,
            xlim=(0, 1),
        )
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
        if statistic.scale == "log":
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.9)
            axes.yaxis.set_major_locator(LogLocator(numticks=8))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0.0)
        if statistic.scale == "share":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
        axes.legend()
    return figure
