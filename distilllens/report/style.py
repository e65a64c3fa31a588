"""How figures look: one theme for light pages and papers, one for dark pages.

Figures are built without pyplot, so nothing global is left open and no display is needed; saving a
bare Figure as PNG uses matplotlib's Agg renderer.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 160
"""Dots per inch of PNGs: 2× the size at which the page shows them."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one appearance."""

    name: str
    surface: str
    """Behind the figure; the page's cards have the same colour."""
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    """Colours of runs, told apart by colour-blind readers too (after Okabe and Ito)."""
    sequential: str
    """Colormap of values ≥ 0: nothing fades into the surface, much stands out."""
    diverging: str
    """Colormap of differences, neutral in the middle."""


LIGHT = Theme(
    name="light",
    surface="#ffffff",
    ink="#1c2530",
    muted="#5b6775",
    grid="#e4e8ee",
    series=("#0067b1", "#d1495b", "#1b8a5a", "#8a4fbf", "#c77d0a", "#3fa7d6", "#5b6775"),
    sequential="YlGnBu",
    diverging="RdBu_r",
)
DARK = Theme(
    name="dark",
    surface="#171c24",
    ink="#e8edf3",
    muted="#9aa7b5",
    grid="#2b333f",
    series=("#5db1f0", "#ff8a96", "#4ecb95", "#c39bf0", "#f2b34c", "#8fd8f7", "#9aa7b5"),
    sequential="YlGnBu_r",
    diverging="berlin",
)
THEMES = (LIGHT, DARK)
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.8), (1.4, 1.6), (6, 1.6, 1.4, 1.6))
"""On and off lengths in line widths: solid, dashed, dotted, dash-dotted."""


@dataclass(frozen=True, kw_only=True)
class LineStyle:
    """How the line at a position of a figure looks, the same in all figures of a report."""

    colour: int
    """Index of `Theme.series`."""
    dash: tuple[float, ...]


def line_style(position: int) -> LineStyle:
    """Returns the style of the line at a position, from 0: first other colours, then other dashes.

    The first 28 differ from each other, and neighbours always do in colour.
    """
    colours = len(LIGHT.series)
    return LineStyle(colour=position % colours, dash=DASHES[position // colours % len(DASHES)])


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Applies a theme to the artists that are made inside; matplotlib's settings come back."""
    with matplotlib.rc_context(
        {
            "font.family": ["DejaVu Sans", "sans-serif"],
            "font.size": 10,
            "text.parse_math": False,  # a run's name may have a $
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.labelsize": 9,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "legend.handlelength": 2.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.linewidth": 0.8,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
            "figure.facecolor": theme.surface,
            "axes.facecolor": theme.surface,
            "text.color": theme.ink,
            "axes.titlecolor": theme.ink,
            "axes.labelcolor": theme.muted,
            "axes.edgecolor": theme.grid,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "grid.color": theme.grid,
        }
    ):
        yield


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns a figure of this size in inches with one pair of axes; call it inside `themed`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def figure_png(figure: Figure) -> bytes:
    """Renders a figure; the same figure gives the same bytes (no date, no version inside)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def figure_svg(figure: Figure, *, outlines: bool = False) -> bytes:
    """Renders a figure as SVG; the same figure gives the same bytes.

    Args:
        figure: To render.
        outlines: Letters as paths, for papers: it looks the same without the font. Else text stays
            text, in a third of the bytes; without DejaVu Sans readers see their own sans-serif.
    """
    buffer = io.BytesIO()
    letters = "path" if outlines else "none"
    with matplotlib.rc_context({"svg.fonttype": letters, "svg.hashsalt": "distilllens"}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", dpi=DPI, metadata=nothing)
    return buffer.getvalue()


def add_legend(figure: Figure, theme: Theme) -> None:
    """Adds a legend below a figure's axes and makes room for it."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if not handles:
        return
    columns = 1 if max(len(label) for label in labels) > 26 else 2
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.12 + 0.19 * -(-len(labels) // columns))
    with themed(theme):
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)
