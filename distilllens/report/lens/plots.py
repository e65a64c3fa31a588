"""Figures of lens maps: heatmaps before, after and their difference, entropy by depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from distilllens.layers import LayerPair
from distilllens.lens_matrix import LensMap
from distilllens.report.plots import Panel
from distilllens.report.style import Theme, new_axes, themed


def plot_lens_map(
    lens_map: LensMap,
    *,
    title: str,
    pairs: Sequence[LayerPair],
    largest: float,
    theme: Theme,
) -> Figure:
    """Draws one map as a heatmap, student layers upward, teacher layers to the right.

    Args:
        lens_map: What to draw.
        title: Of the figure.
        pairs: Layers that the run paired; their cells are framed.
        largest: Upper end of the colour scale in nats, from 0; equal for maps to be compared.
        theme: Colours.
    """
    with themed(theme):
        figure, axes = _map_axes(lens_map.divergence_ST.shape)
        image = axes.imshow(
            lens_map.divergence_ST,
            origin="lower",
            aspect="auto",
            cmap=theme.sequential,
            vmin=0.0,
            vmax=largest,
            extent=_extent(lens_map.divergence_ST.shape),
        )
        _label_map(axes, title=title, pairs=pairs, theme=theme)
        _colour_bar(figure, axes, image, "JSD, nats")
    return figure


def plot_lens_change(
    before: LensMap,
    after: LensMap,
    *,
    pairs: Sequence[LayerPair],
    largest: float,
    theme: Theme,
) -> Figure:
    """Draws after − before; ``largest`` is the end of the symmetric colour scale in nats."""
    change_ST = after.divergence_ST - before.divergence_ST
    with themed(theme):
        figure, axes = _map_axes(change_ST.shape)
        image = axes.imshow(
            change_ST,
            origin="lower",
            aspect="auto",
            cmap=theme.diverging,
            vmin=-largest,
            vmax=largest,
            extent=_extent(change_ST.shape),
        )
        _label_map(axes, title="Change (after − before)", pairs=pairs, theme=theme)
        _colour_bar(figure, axes, image, "change of JSD, nats")
    return figure


def plot_entropy(before: LensMap, after: LensMap, *, theme: Theme) -> Figure:
    """Draws the lens entropy of teacher and student over relative depth (100 %: last block)."""
    with themed(theme):
        figure, axes = new_axes(7.2, 3.4)
        for values, label, colour, style, fill in (
            (after.teacher_entropy_T, "teacher", theme.ink, "-", theme.ink),
            (before.student_entropy_S, "student before", theme.series[0], "--", theme.surface),
            (after.student_entropy_S, "student after", theme.series[0], "-", theme.series[0]),
        ):
            depth = np.arange(1, len(values) + 1) / len(values)
            axes.plot(
                depth,
                values,
                style,
                color=colour,
                marker="o",
                markersize=4,
                markerfacecolor=fill,
                label=label,
            )
        axes.set(
            title="Entropy of the lens by depth",
            xlabel="depth: block / number of blocks",
            ylabel="entropy, nats",
            ylim=(0, None),
        )
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
        axes.margins(x=0.02)
        axes.legend()
    return figure


def _map_axes(shape: tuple[int, ...]) -> tuple[Figure, Axes]:
    """Returns axes whose height follows the ratio of layers, within what a page can show."""
    num_student, num_teacher = shape
    height = float(np.clip(1.2 + 4.2 * num_student / num_teacher, 2.6, 5.4))
    return new_axes(5.6, height)


def _extent(shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Puts the centre of a cell on its layer numbers, counted from 1."""
    num_student, num_teacher = shape
    return 0.5, num_teacher + 0.5, 0.5, num_student + 0.5


def _label_map(axes: Axes, *, title: str, pairs: Sequence[LayerPair], theme: Theme) -> None:
    axes.set(title=title, xlabel="teacher block", ylabel="student block")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 4, 5, 10]))
    for pair in pairs:
        # Two frames, so that one of them stands out from any colour of the map.
        for colour, width in ((theme.surface, 3.4), (theme.series[1], 1.8)):
            corner = (pair.teacher - 0.5, pair.student - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))


def _colour_bar(figure: Figure, axes: Axes, image: AxesImage, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.set_label(label)


def colour_limit(arrays: Sequence[NDArray[np.float64]]) -> float:
    """Returns the largest absolute finite value, the end of a colour scale; 1e-9 if all are 0."""
    finite = [np.abs(array[np.isfinite(array)]).max(initial=0.0) for array in arrays]
    return max(1e-9, float(max(finite, default=0.0)))


def lens_panels(
    before: LensMap,
    after: LensMap,
    *,
    pairs: Sequence[LayerPair],
    largest: float,
    largest_change: float,
    prefix: str,
) -> list[Panel]:
    """Returns the panels of one run: before, after, change, and last the entropy.

    Args:
        before: Map of the initial student.
        after: Map of the trained student.
        pairs: Layers that the run paired.
        largest: End of the colour scale of the maps in nats.
        largest_change: End of the colour scale of the change in nats.
        prefix: Of the panels' names.
    """
    framed = "Frames: the layers this run pairs." if pairs else "This run pairs no layers."

    def map_panel(lens_map: LensMap, when: str) -> Panel:
        return Panel(
            name=f"{prefix}_{when}",
            alt=f"Heatmap of the lens divergence, student blocks × teacher blocks, {when} training",
            caption=f"{when.capitalize()} training. {framed}",
            draw=lambda theme: plot_lens_map(
                lens_map,
                title=f"{when.capitalize()} training",
                pairs=pairs,
                largest=largest,
                theme=theme,
            ),
        )

    return [
        map_panel(before, "before"),
        map_panel(after, "after"),
        Panel(
            name=f"{prefix}_change",
            alt="Heatmap of the change of the lens divergence by training",
            caption="After − before. Blue: student and teacher came closer; red: further apart.",
            draw=lambda theme: plot_lens_change(
                before, after, pairs=pairs, largest=largest_change, theme=theme
            ),
        ),
        Panel(
            name=f"{prefix}_entropy",
            alt="Entropy of the lens distribution over relative depth, teacher and student",
            caption="How undecided each block is. Depth is relative, so that models of different "
            "numbers of blocks lie over each other.",
            draw=lambda theme: plot_entropy(before, after, theme=theme),
        ),
    ]
