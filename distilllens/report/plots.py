"""Figures of training and of scores: curves from metrics.jsonl, seeds as dots.

Each figure is one panel, so that a page can lay them out side by side or below each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distilllens.report.run_record import RunRecord
from distilllens.report.style import Theme, new_axes, themed
from distilllens.report.tables import ScoreTable

LENS_LAYER = re.compile(r"train/lens/.+/L(\d+)")
SMOOTH_FROM = 60
"""Curves with more points than this get a running mean over the noisy line."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of a report, drawn anew for each theme."""

    name: str
    """Stem of the PNG's file name."""
    alt: str
    """What the picture shows, for readers who cannot see it."""
    caption: str
    draw: Callable[[Theme], Figure]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric of metrics.jsonl and how it is drawn."""

    key: str
    title: str
    unit: str
    caption: str
    markers: bool = False


CURVES = (
    Curve(
        key="train/loss",
        title="Training loss",
        unit="nats per response token",
        caption="The loss that is minimised. Approaches add up different terms, so levels compare "
        "only between runs of one objective.",
    ),
    Curve(
        key="eval/dev/loss",
        title="Dev loss",
        unit="nats per response token",
        caption="Cross entropy on the held-out dev records' answers: comparable between all runs.",
        markers=True,
    ),
    Curve(
        key="train/loss/ce",
        title="Cross entropy on the records' answers",
        unit="nats per response token",
        caption="The term of supervised fine-tuning.",
    ),
    Curve(
        key="train/loss/kd",
        title="Final-layer divergence",
        unit="nats per response token",
        caption="Between the final distributions of teacher and student, of the run's own kind.",
    ),
    Curve(
        key="train/loss/lens",
        title="Lens divergence",
        unit="nats per response token",
        caption="Mean over the paired layers.",
    ),
    Curve(
        key="train/loss/hidden",
        title="Hidden-state distance",
        unit="distance per response token",
        caption="Mean over the paired layers: mean squared difference, or 1 − cosine.",
    ),
    Curve(
        key="eval/dev/rougeL",
        title="Dev Rouge-L",
        unit="Rouge-L F1 × 100",
        caption="Of generated answers to the dev prompts.",
        markers=True,
    ),
    Curve(
        key="train/lr",
        title="Learning rate",
        unit="learning rate",
        caption="Warmup and schedule as they ran.",
    ),
    Curve(
        key="train/grad_norm",
        title="Gradient norm",
        unit="L2 norm before clipping",
        caption="Over all trained parameters.",
    ),
)


def curve_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Returns a panel for every metric that at least one run logged, all runs in it.

    Colours follow the order of the runs, so one run has one colour in every panel.
    """
    return [
        _curve_panel(runs, curve)
        for curve in CURVES
        if any(run.series(curve.key)[0] for run in runs)
    ]


def _curve_panel(runs: Sequence[RunRecord], curve: Curve) -> Panel:
    return Panel(
        name="curve_" + curve.key.replace("/", "_"),
        alt=f"{curve.title} over optimizer steps, one line per run",
        caption=curve.caption,
        draw=lambda theme: plot_curve(runs, curve, theme=theme),
    )


def lens_layer_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Returns a panel of the per-layer lens divergences for each run that logged them."""
    return [
        _lens_layer_panel(run, number)
        for number, run in enumerate(runs, start=1)
        if lens_layer_keys(run)
    ]


def _lens_layer_panel(run: RunRecord, number: int) -> Panel:
    return Panel(
        name=f"lens_layers_{number}",
        alt=f"Lens divergence of each paired student layer of {run.label} over optimizer steps",
        caption=f"{run.label}: each line is the lens divergence of one paired student layer.",
        draw=lambda theme: plot_lens_layers(run, theme=theme),
    )


def lens_layer_keys(run: RunRecord) -> list[tuple[int, str]]:
    """Returns student layer and key of each per-layer metric, such as train/lens/jsd/L06."""
    found = [(LENS_LAYER.fullmatch(key), key) for key in run.keys("train/lens/")]
    return sorted((int(match.group(1)), key) for match, key in found if match)


def plot_curve(runs: Sequence[RunRecord], curve: Curve, *, theme: Theme) -> Figure:
    """Draws one metric of several runs over optimizer steps."""
    with themed(theme):
        figure, axes = new_axes(5.6, 3.4)
        for position, run in enumerate(runs):
            steps, values = run.series(curve.key)
            if not steps:
                continue
            colour = theme.series[position % len(theme.series)]
            if curve.markers or len(steps) == 1:
                axes.plot(steps, values, "o-", color=colour, markersize=4.5, label=run.label)
            elif len(steps) > SMOOTH_FROM:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
                axes.plot(steps, running_mean(values), color=colour, label=run.label)
            else:
                axes.plot(steps, values, color=colour, label=run.label)
        axes.set(title=curve.title, xlabel="optimizer step", ylabel=curve.unit)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.margins(x=0.02)
        axes.legend()
    return figure


def plot_lens_layers(run: RunRecord, *, theme: Theme) -> Figure:
    """Draws the lens divergence of every paired student layer of one run, shallow to deep."""
    keys = lens_layer_keys(run)
    with themed(theme):
        figure, axes = new_axes(5.6, 3.4)
        # The ends of the map are left out: one of them has the surface's colour.
        colours = matplotlib.colormaps["viridis"](np.linspace(0.08, 0.88, len(keys)))
        for (layer, key), colour in zip(keys, colours, strict=True):
            steps, values = run.series(key)
            smooth = running_mean(values) if len(values) > SMOOTH_FROM else np.asarray(values)
            marker = "o" if len(values) == 1 else ""
            axes.plot(steps, smooth, marker=marker, color=colour, label=f"layer {layer}")
        axes.set(
            title="Lens divergence by student layer",
            xlabel="optimizer step",
            ylabel="nats per response token",
        )
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.margins(x=0.02)
        axes.legend(ncols=2 if len(keys) > 4 else 1)
    return figure


def score_panel(table: ScoreTable) -> Panel | None:
    """Returns the panel of a table's last column: the average, or the only set.

    None where no method has a value there.
    """
    column = "average over sets" if table.has_average else "".join(table.sets)
    cells = [row.average if table.has_average else row.cells[column] for row in table.rows]
    found = [
        (row.label, cell.values, cell.mean, cell.sd)
        for row, cell in zip(table.rows, cells, strict=True)
        if cell is not None
    ]
    if not found:
        return None

    def draw(theme: Theme) -> Figure:
        with themed(theme):
            figure, axes = new_axes(7.2, 0.9 + 0.46 * len(found))
            for position, (_, values, mean, sd) in enumerate(found):
                colour = theme.series[0]
                axes.plot(
                    values, [position - 0.22] * len(values), "o", color=colour, alpha=0.4, ms=4
                )
                axes.errorbar(
                    mean, position, xerr=sd or None, fmt="o", color=colour, ms=6, lw=2, capsize=5
                )
            axes.set(title=f"{table.title}, {column}", xlabel=table.title)
            axes.set_yticks(range(len(found)), [label for label, *_ in found])
            axes.tick_params(axis="y", labelcolor=theme.ink)
            axes.grid(visible=False, axis="y")
            axes.set_ylim(len(found) - 0.4, -0.6)
        return figure

    return Panel(
        name=f"scores_{table.metric}",
        alt=f"{table.title} of each method, {column}: seeds, mean and standard deviation",
        caption="Small dots: one seed each. Large dot and bar: mean ± sample standard deviation. "
        "The axis does not begin at 0.",
        draw=draw,
    )


def running_mean(values: Sequence[float]) -> NDArray[np.float64]:
    """Returns the mean over a centred window of about 1/25 of the curve, shorter at its ends.

    Values that are not finite stay gaps and are left out of their neighbours' means.
    """
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    half = max(1, len(values) // 50)
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan)
