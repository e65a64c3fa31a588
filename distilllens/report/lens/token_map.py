"""Token × layer maps: what every block of several models would say at every token of one answer.

Shapes: N response tokens, L layers, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from distilllens.layers import LayerPair
from distilllens.report.lens.readings import LensReadings
from distilllens.report.lens.samples import TextSample
from distilllens.report.style import Theme, themed

SURE_COLOURS = {
    "light": ("#f3f6fa", "#c9def0", "#7db5de", "#0067b1", "#083358"),
    "dark": ("#1b212b", "#20384f", "#225f8f", "#5db1f0", "#d3ecff"),
}
"""From undecided (large entropy) to sure (entropy 0), by theme."""
STATIC_TOKENS = 24
"""Columns of a static figure: more would not be readable in print."""
BESIDE_TOKENS = 8
"""Up to so many columns the maps of all models stand side by side."""
STATIC_LAYERS = 16
"""Rows of a static figure; of deeper models every so many blocks are drawn, the last always."""


@dataclass(frozen=True, kw_only=True)
class SampleReadings:
    """One answer, read by every model."""

    sample: TextSample
    answer: str
    """The answer's text, without special tokens."""
    readings: tuple[LensReadings, ...]
    """One per model, in the order of the page."""


def sure_colours(theme: Theme) -> LinearSegmentedColormap:
    """Returns the colours of the token maps: 0 is undecided, 1 is sure."""
    return LinearSegmentedColormap.from_list("sure", list(SURE_COLOURS[theme.name]), N=256)


def counterparts(num_layers: int, num_others: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Returns, for every layer of one model, the layer of another that stands at the same depth.

    Paired layers meet; between the pairs, before the first and behind the last, depth runs evenly:
    the line through (0, 0), the pairs and (num_layers, num_others), rounded, halves up. Without
    pairs that is the layer nearest in relative depth.

    Args:
        num_layers: Blocks of the one model.
        num_others: Blocks of the other.
        pairs: (layer of the one, layer of the other), counted from 1.

    Returns:
        ``num_layers`` layers of the other model, counted from 1.
    """
    points = [(0, 0), *sorted(pairs), (num_layers, num_others)]
    at, other = zip(*points, strict=True)
    exact = np.interp(np.arange(1, num_layers + 1), at, other)
    # 1e-9: 2.5 may come out as 2.4999999999999996.
    return [int(value) for value in np.clip(np.floor(exact + 0.5 + 1e-9), 1, num_others)]


def counterpart_table(depths: Sequence[int], pairs: Sequence[LayerPair]) -> list[list[list[int]]]:
    """Returns ``table[i][j]``: for every layer of model i the layer of model j.

    Args:
        depths: Blocks of each model; the first is the teacher, the others are students.
        pairs: Layers that training paired.
    """
    forward = [(pair.teacher, pair.student) for pair in pairs]
    backward = [(student, teacher) for teacher, student in forward]

    def between(i: int, j: int) -> list[int]:
        if i == j or (i > 0 and j > 0):
            return counterparts(depths[i], depths[j], [])
        return counterparts(depths[i], depths[j], forward if i == 0 else backward)

    models = range(len(depths))
    return [[between(i, j) for j in models] for i in models]


def shown_layers(count: int, most: int = STATIC_LAYERS) -> list[int]:
    """Returns at most ``most`` layers, counted from 1, evenly spread and down from the last."""
    step = -(-count // most)
    return list(range(count, 0, -step))


def plot_token_map(
    shown: SampleReadings,
    *,
    labels: Sequence[str],
    text_of: Callable[[int], str],
    largest: float,
    theme: Theme,
) -> Figure:
    """Draws an answer's maps: the lens's top token of every cell, shaded by entropy.

    Maps of short answers stand side by side, those of long ones below each other.

    Args:
        shown: The answer and its readings.
        labels: Of the models.
        text_of: The shown form of a token.
        largest: Entropy in nats at the pale end of the colours; 0 is the dark end.
        theme: Colours.
    """
    count = min(STATIC_TOKENS, shown.readings[0].num_tokens)
    rows = [shown_layers(readings.num_layers) for readings in shown.readings]
    beside = count <= BESIDE_TOKENS
    widths = [0.55 + 0.62 * count] * (len(labels) if beside else 1)
    depth = [len(layers) for layers in rows]
    heights = [1.0 + 0.27 * max(depth)] if beside else [1.0 + 0.27 * n for n in depth]
    with themed(theme):
        figure = Figure(figsize=(max(sum(widths) + 0.8, 5.0), sum(heights)), layout="constrained")
        panels = figure.subplots(
            len(heights), len(widths), squeeze=False, height_ratios=heights
        ).flatten()
        for axes, label, readings, layers in zip(panels, labels, shown.readings, rows, strict=True):
            _draw_map(axes, readings, layers, count, text_of, largest, theme)
            axes.set_title(label)
        scale = ScalarMappable(norm=Normalize(0, largest), cmap=sure_colours(theme).reversed())
        bar = figure.colorbar(scale, ax=list(panels), pad=0.01, fraction=0.02, aspect=26)
        bar.outline.set_visible(False)
        bar.set_label("entropy, nats")
    return figure


def _draw_map(
    axes: Axes,
    readings: LensReadings,
    layers: Sequence[int],
    count: int,
    text_of: Callable[[int], str],
    largest: float,
    theme: Theme,
) -> None:
    """Draws one model's map: tokens to the right, the last layer at the top."""
    colours = sure_colours(theme)
    axes.set(xlim=(0, count), ylim=(len(layers), 0))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for row, layer in enumerate(layers):
        for token in range(count):
            colour = colours(1 - min(1.0, readings.entropy_LN[layer - 1, token] / largest))
            top = int(readings.top_LNK[layer - 1, token, 0])
            corner = (token + 0.02, row + 0.03)
            cell = axes.add_patch(Rectangle(corner, 0.96, 0.94, facecolor=colour, linewidth=0))
            hit = top == readings.gold_N[token]
            text = axes.text(
                token + 0.5,
                row + 0.52,
                drawable(text_of(top), 8),
                ha="center",
                va="center",
                fontsize=6.4,
                fontweight="bold" if hit else "normal",
                color=ink_on(colour),
                parse_math=False,
            )
            # The layout measures hundreds of them otherwise, three times as slowly.
            cell.set_in_layout(False)
            text.set_in_layout(False)
    golds = [drawable(text_of(int(gold)), 9) for gold in readings.gold_N[:count]]
    axes.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
    axes.set_xticks(np.arange(count) + 0.5, golds, rotation=40, ha="right", fontsize=7)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)
    axes.set(ylabel="block", xlabel="the answer's tokens")


def ink_on(colour: tuple[float, ...]) -> str:
    """Returns black or white, whichever stands out more from a colour (WCAG 2.2 contrast).

    The worse of the two best is 4.58 : 1, above the 4.5 that WCAG asks of small text.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def drawable(text: str, most: int) -> str:
    """Returns a text cut to ``most`` characters, with □ for those that the figures' font lacks."""
    font = _figure_font()
    shown = "".join(c if font.get_char_index(ord(c)) else "□" for c in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


@cache
def _figure_font() -> FT2Font:
    return get_font(findfont(FontProperties(family="DejaVu Sans")))
