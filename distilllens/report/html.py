"""One self-contained page: tables, figures as data URIs, samples; nothing is fetched.

It has no script, but while a run is watched: then a short one loads the page again and puts the
reader back where they were. Everything that a model or a data file wrote is escaped by the template
engine (autoescape).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined

from distilllens.report.plots import Panel
from distilllens.report.runs.differences import Differences
from distilllens.report.scores.samples import SampleSet, marked_words, shown_prompt
from distilllens.report.scores.table import ScoreTable
from distilllens.report.style import (
    LIGHT,
    THEMES,
    LineStyle,
    add_legend,
    figure_png,
    figure_svg,
)
from distilllens.report.tables import TextTable


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """A figure in both themes."""

    name: str
    alt: str
    caption: str
    light: str
    """Data URI."""
    dark: str
    """Data URI."""
    width: int
    """CSS pixels, for the room that the page keeps before the picture is there."""
    height: int
    light_png: bytes
    """For a file of its own; empty where only the page is wanted."""


@dataclass(frozen=True, kw_only=True)
class FigureGroup:
    """Figures under one heading."""

    title: str
    figures: Sequence[PageFigure]


@dataclass(frozen=True, kw_only=True)
class LensSection:
    """The maps of one run."""

    label: str
    caption: str
    paired: str
    """Mean over the paired cells, before → after; empty without pairs."""
    num_pairs: int
    maps: Sequence[PageFigure]
    entropy: PageFigure


@dataclass(frozen=True, kw_only=True)
class Live:
    """What a page of runs under way says, beside the report."""

    seconds: float
    """The page loads itself again so often."""
    written: str
    """Time of day."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page shows, top to bottom."""

    title: str
    subtitle: str
    notes: Sequence[str]
    """What a reader must know before the figures: missing parts, unequal settings."""
    progress_header: Sequence[str]
    progress: Sequence[Sequence[str]]
    """A run's cells, one for each column of the header."""
    run_styles: Sequence[LineStyle]
    """Of the run's lines in the curves, one for each row of `progress`."""
    tables: Sequence[ScoreTable]
    prompt_counts: Mapping[str, int]
    score_figures: Sequence[PageFigure]
    comparisons: Sequence[tuple[str, TextTable, Sequence[str]]]
    """Titles, tables and numbered notes: differences to a baseline, the paper's figures."""
    group_labels: Sequence[str]
    """Lines of the curves: runs, or methods with several seeds."""
    group_styles: Sequence[LineStyle]
    curves: Sequence[FigureGroup]
    lens: Sequence[LensSection]
    differences: Differences
    """Values stand in the order of `group_labels`."""
    run_labels: Sequence[str]
    run_rows: Sequence[tuple[str, Sequence[str]]]
    """A setting and its value in each run."""
    samples: Sequence[SampleSet]
    teachers: Collection[str]
    """Which of the methods in the samples are teachers of the runs."""
    explanations: Sequence[str]
    footer: str = field(default="")
    live: Live | None = None


class Drawings:
    """Draws panels for a page, and keeps them for as long as what they show stays the same.

    Args:
        png: Whether files of their own are wanted too.
    """

    def __init__(self, *, png: bool = True) -> None:
        self.png = png
        self.num_drawn = 0
        self._kept: dict[str, tuple[str, PageFigure]] = {}

    def render(self, panel: Panel) -> PageFigure:
        """Returns a panel drawn in both themes."""
        content, figure = self._kept.get(panel.name, ("", None))
        if figure is None or not panel.content or content != panel.content:
            self.num_drawn += 1
            figure = render_figure(panel, png=self.png)
            self._kept[panel.name] = (panel.content, figure)
        return figure


def render_figure(panel: Panel, *, png: bool = True) -> PageFigure:
    """Draws a panel in both themes, and as a PNG if asked for."""
    figures = [panel.draw(theme) for theme in THEMES]
    width, height = figures[0].get_size_inches()
    light, dark = (figure_svg(figure) for figure in figures)
    if png and not panel.own_legend:
        add_legend(figures[0], LIGHT)
    return PageFigure(
        name=panel.name,
        alt=panel.alt,
        caption=panel.caption,
        light=data_uri(light, "image/svg+xml"),
        dark=data_uri(dark, "image/svg+xml"),
        width=round(96 * width),
        height=round(96 * height),
        light_png=figure_png(figures[0]) if png else b"",
    )


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Returns a picture as a URL that holds the picture itself."""
    return f"data:{kind};base64," + base64.b64encode(content).decode("ascii")


def render_page(page: Page) -> str:
    """Returns the page as HTML."""
    environment = Environment(
        loader=PackageLoader("distilllens.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("live.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    template = environment.get_template("page.html")
    return (
        template.render(
            page=page,
            themes=THEMES,
            script_source=f"'sha256-{digest}'",
            shown_prompt=shown_prompt,
            marked_words=marked_words,
        )
        + "\n"
    )
