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


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Applies a theme to the artists that are made inside; matplotlib's settings come back."""
    with matplotlib.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
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


def figure_svg(figure: Figure) -> bytes:
    """Renders a figure as SVG, letters as paths, so that it looks the same without the font.

    The same figure gives the same bytes: no date, and names that depend on the content only.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "distilllens", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
