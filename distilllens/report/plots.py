"""Figures of training and of scores: curves from metrics.jsonl, seeds as dots.

Each figure is one panel, so that a page can lay them out side by side or below each other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from distilllens.report.runs.curves import LAYER_TERMS, PER_LAYER, Curve, curves_of
from distilllens.report.runs.groups import RunGroup, Series
from distilllens.report.scores.table import ScoreTable
from distilllens.report.style import Theme, line_style, new_axes, themed

CURVE_SIZE = (4.3, 2.75)
"""Inches: as wide as a phone, so that text is as large there as beside other panels."""
LONGEST_TITLE = 36
"""Characters that fit above a curve."""
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
    content: str = ""
    """Hash of what it shows; empty: unknown, so that it is always drawn anew."""
    own_legend: bool = True
    """False: the page has one legend for all such panels, and a file gets its own."""


def curve_panels(groups: Sequence[RunGroup]) -> list[tuple[Curve, Panel]]:
    """Returns every metric that at least one run logged, with its panel of all groups.

    Styles follow the order of the groups, so one group looks the same in every panel.
    """
    return [(curve, _curve_panel(groups, curve)) for curve in curves_of(groups)]


def _curve_panel(groups: Sequence[RunGroup], curve: Curve) -> Panel:
    lines = [(group.label, group.series(curve.key)) for group in groups]
    arrays = [array for _, line in lines for array in _arrays(line)]
    return Panel(
        name="curve_" + _file_stem(curve.key),
        alt=f"{curve.title} over optimizer steps, one line per "
        f"{'method' if any(len(group.runs) > 1 for group in groups) else 'run'}",
        caption=curve.caption,
        draw=lambda theme: plot_curve(lines, curve, theme=theme),
        content=_digest([curve.key, *(label for label, _ in lines)], arrays),
        own_legend=False,
    )


def _file_stem(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", key)


def _arrays(line: Series) -> tuple[NDArray[np.int64] | NDArray[np.float64], ...]:
    return line.steps, line.mean, line.low, line.high, line.bad


def plot_curve(lines: Sequence[tuple[str, Series]], curve: Curve, *, theme: Theme) -> Figure:
    """Draws one metric of several groups over optimizer steps.

    Args:
        lines: Label and values, in the order of the styles; empty ones are left out.
        curve: What it is.
        theme: Colours.
    """
    with themed(theme):
        figure, axes = new_axes(*CURVE_SIZE)
        for position, (label, line) in enumerate(lines):
            if len(line.steps):
                _draw_line(axes, line, curve, label=label, position=position, theme=theme)
        means = np.concatenate([line.mean for _, line in lines])
        means = means[np.isfinite(means)]
        unit = curve.unit
        span = means.max() / means.min() if len(means) and means.min() > 0 else 0.0
        if curve.may_be_log and span > 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1,)))
            axes.yaxis.set_major_formatter(_plain_number)
            axes.yaxis.set_minor_locator(NullLocator())
            unit += ", log scale"
        axes.set(title=curve.title, xlabel="optimizer step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.margins(x=0.02)
    return figure


def _draw_line(
    axes: Axes, line: Series, curve: Curve, *, label: str, position: int, theme: Theme
) -> None:
    style = line_style(position)
    colour = theme.series[style.colour]
    dashes = (0, style.dash) if style.dash else "solid"
    mean = line.mean
    if line.has_band:
        axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
    if len(mean) > SMOOTH_FROM and not curve.markers:
        if not line.has_band:
            axes.plot(line.steps, mean, color=colour, linewidth=0.7, alpha=0.3)
        mean = running_mean(mean)
    marker = "o" if curve.markers or len(mean) == 1 else ""
    # matplotlib leaves labels that begin with _ out of legends.
    label = f" {label}" if label.startswith("_") else label
    axes.plot(
        line.steps, mean, color=colour, linestyle=dashes, marker=marker, markersize=4, label=label
    )
    if len(line.bad):  # no place on the axis, but never hidden
        foot = [0.03] * len(line.bad)
        axes.plot(line.bad, foot, "x", color=colour, transform=axes.get_xaxis_transform())


def _plain_number(value: float, _position: float) -> str:
    return f"{value:g}" if 1e-4 <= abs(value) < 1e5 else f"{value:.0e}"


def layer_panels(groups: Sequence[RunGroup]) -> list[Panel]:
    """Returns a heatmap of paired layers × steps for each group and term that was logged by layer.

    Heatmaps of one term and kind share their colour scale, so that groups compare.
    """
    maps = [
        (number, group, kind, layer_map(group, kind))
        for number, group in enumerate(groups, start=1)
        for kind in layer_kinds(group)
    ]
    panels = []
    for number, group, kind, layers in maps:
        term, measure = kind
        same = [other.values_KS for _, _, other_kind, other in maps if other_kind == kind]
        finite = [float(values[np.isfinite(values)].max(initial=0.0)) for values in same]
        largest = max(finite) or 1.0
        name = LAYER_TERMS[term]
        panels.append(
            Panel(
                name=f"{term}_layers_{number}_{_file_stem(measure)}",
                alt=f"{name} ({measure}) of each pair of layers of {group.label} over steps",
                caption=f"{name} ({measure}) by layer, deep ones above"
                + ("; mean over the seeds." if len(group.runs) > 1 else "."),
                draw=partial(plot_layers, layers, title=group.label, largest=largest),
                content=_digest(
                    [group.label, name, *layers.labels], [layers.steps, layers.values_KS, largest]
                ),
            )
        )
    return panels


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """A term of every paired layer over the steps."""

    labels: tuple[str, ...]
    """Of the rows, shallow to deep: teacher→student."""
    steps: NDArray[np.int64]
    values_KS: NDArray[np.float64]
    """NaN where nothing finite was logged."""


def layer_kinds(group: RunGroup) -> list[tuple[str, str]]:
    """Returns term and measure of what was logged by layer, such as lens and jsd."""
    found = (PER_LAYER.fullmatch(key) for key in group.keys("train/"))
    return list(dict.fromkeys((match[1], match[2]) for match in found if match))


def layer_map(group: RunGroup, kind: tuple[str, str]) -> LayerMap:
    """Returns a term of every paired layer, the mean over the group's runs."""
    matches = (PER_LAYER.fullmatch(key) for key in group.keys("train/"))
    keys = sorted((int(m[3]), m[0]) for m in matches if m and (m[1], m[2]) == kind)
    pairs = group.runs[0].pairs
    labels = []
    for layer, _ in keys:
        teachers = "+".join(str(pair.teacher) for pair in pairs if pair.student == layer)
        labels.append(f"{teachers}→{layer}" if teachers else str(layer))
    series = [group.series(key) for _, key in keys]
    steps = np.unique(np.concatenate([line.steps for line in series]))
    values_KS = np.full((len(series), len(steps)), np.nan)
    for row, line in enumerate(series):
        values_KS[row, np.searchsorted(steps, line.steps)] = line.mean
    return LayerMap(labels=tuple(labels), steps=steps, values_KS=values_KS)


def plot_layers(layers: LayerMap, theme: Theme, *, title: str, largest: float) -> Figure:
    """Draws one map: steps to the right, deep layers above, colour from 0 to ``largest``."""
    with themed(theme):
        width, height = CURVE_SIZE
        figure, axes = new_axes(width, max(height * 0.75, 1.1 + 0.21 * len(layers.labels)))
        rows = np.arange(len(layers.labels) + 1) - 0.5
        mesh = axes.pcolormesh(
            _edges(layers.steps),
            rows,
            np.ma.masked_invalid(layers.values_KS),
            cmap=theme.sequential,
            vmin=0.0,
            vmax=largest,
            rasterized=True,  # else an SVG has a path for each cell
        )
        paired = "→" in "".join(layers.labels)
        axes.set(
            title=title if len(title) <= LONGEST_TITLE else title[: LONGEST_TITLE - 1] + "…",
            xlabel="optimizer step",
            ylabel="teacher→student layer" if paired else "student layer",
        )
        axes.set_yticks(range(len(layers.labels)), layers.labels)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.grid(visible=False)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=14)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    return figure


def _edges(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns where each step's cell ends: half way to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = 2 * steps[0] - middles[0], 2 * steps[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def _digest(words: Sequence[str], arrays: Sequence[object]) -> str:
    """Returns a short hash of what a panel shows: equal where it need not be drawn again."""
    digest = hashlib.blake2b(repr(words).encode(errors="backslashreplace"), digest_size=16)
    for array in arrays:
        digest.update(np.asarray(array).tobytes() + b";")
    return digest.hexdigest()


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
            figure, axes = new_axes(5.0, 0.9 + 0.4 * len(found))
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


def running_mean(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
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
