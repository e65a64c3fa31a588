"""One self-contained page: tables, figures as data URIs, samples; no script, nothing is fetched.

Everything that a model or a data file wrote is escaped by the template engine (autoescape).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined

from distilllens.report.plots import Panel
from distilllens.report.samples import SampleSet, shown_prompt
from distilllens.report.style import THEMES, figure_png
from distilllens.report.tables import ScoreTable


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
    light_png: bytes


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
class Page:
    """What the page shows, top to bottom."""

    title: str
    subtitle: str
    notes: Sequence[str]
    """What a reader must know before the figures: missing parts, unequal settings."""
    tables: Sequence[ScoreTable]
    prompt_counts: Mapping[str, int]
    score_figures: Sequence[PageFigure]
    curves: Sequence[PageFigure]
    lens: Sequence[LensSection]
    run_labels: Sequence[str]
    run_rows: Sequence[tuple[str, Sequence[str]]]
    """A setting and its value in each run."""
    samples: Sequence[SampleSet]
    explanations: Sequence[str]
    footer: str = field(default="")


def render_figure(panel: Panel) -> PageFigure:
    """Draws a panel in both themes."""
    light, dark = (figure_png(panel.draw(theme)) for theme in THEMES)
    return PageFigure(
        name=panel.name,
        alt=panel.alt,
        caption=panel.caption,
        light=data_uri(light),
        dark=data_uri(dark),
        light_png=light,
    )


def data_uri(png: bytes) -> str:
    """Returns a PNG as a URL that holds the image itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def render_page(page: Page) -> str:
    """Returns the page as HTML."""
    environment = Environment(
        loader=PackageLoader("distilllens.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(page=page, shown_prompt=shown_prompt) + "\n"
