"""lens.html: one self-contained page that draws a lens report's numbers and can be walked through.

The page loads nothing. Its content security policy allows one script, by its SHA-256, and no
other; all text of models and data lies in a JSON block and reaches the page as text nodes only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import Colormap, to_hex

from distilllens.public import public_path
from distilllens.report.lens.statistics import (
    STATISTICS,
    PerLayer,
    Statistic,
    statistics_rows,
)
from distilllens.report.lens.study import Study
from distilllens.report.lens.token_map import ink_on, sure_colours
from distilllens.report.style import DARK, LIGHT

LEVELS = 40
"""Colours of a scale: neighbours cannot be told apart any more."""
SCRIPTS = ("charts.js", "tokens.js", "page.js")
LAST_LAYER = {
    "nll": ("Loss on held-out answers", "nats per token of the reference answers"),
    "teacher_agreement": (
        "Agreement with the teacher",
        "of tokens: the same likeliest token, last layers",
    ),
    "calibration_error": ("Calibration error (ECE)", "last layer; 0: as often right as it says"),
}
"""Statistics whose last layer sums up a student, with title and note."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number that sums up, before and after."""

    title: str
    before: str
    """Empty without a student before."""
    after: str
    note: str


def render_lens_page(study: Study, document: dict[str, Any], *, footer: str) -> str:
    """Returns the page.

    Args:
        study: The report.
        document: Its numbers, from `distilllens.report.lens.files.study_document`.
        footer: Last line.
    """
    environment = Environment(
        loader=PackageLoader("distilllens.report.lens", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loader = environment.loader
    assert loader is not None
    script = "".join(loader.get_source(environment, name)[0] for name in SCRIPTS)
    return (
        environment.get_template("page.html").render(
            title=f"{shown_name(study.models[1].path)} and its teacher, layer by layer",
            study=study,
            tiles=summary_tiles(study),
            statistics=STATISTICS,
            rows=statistics_rows(
                [model.label for model in study.models],
                [model.statistics for model in study.models],
            ),
            shown=shown_value,
            public_path=public_path,
            css=loader.get_source(environment, "page.css")[0],
            palettes=palette_css(),
            script=script,
            script_hash=script_hash(script),
            data=embedded_json(document),
            footer=footer,
        )
        + "\n"
    )


def embedded_json(document: dict[str, Any]) -> str:
    """Returns JSON that may stand inside a script element: ASCII only, and no < > or &."""
    text = json.dumps(document, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def script_hash(script: str) -> str:
    """Returns the source expression by which a content security policy allows this script."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def palette_css() -> str:
    """Returns the colours of all scales as CSS variables, each for light and dark pages.

    ``--s0`` (undecided) … ``--s39`` (sure) with ``--i0`` … the ink that is readable on it,
    ``--h0`` … of divergences, ``--d0`` … of changes.
    """
    sure = _levels(sure_colours(LIGHT)), _levels(sure_colours(DARK))
    inks = [[ink_on(matplotlib.colors.to_rgb(colour)) for colour in side] for side in sure]
    scales = {
        "s": sure,
        "i": tuple(inks),
        "h": tuple(_levels(matplotlib.colormaps[t.sequential]) for t in (LIGHT, DARK)),
        "d": tuple(_levels(matplotlib.colormaps[t.diverging]) for t in (LIGHT, DARK)),
    }
    lines = [
        f"--{name}{level}:light-dark({light},{dark});"
        for name, (lights, darks) in scales.items()
        for level, (light, dark) in enumerate(zip(lights, darks, strict=True))
    ]
    cells = [
        f".s{level}{{background:var(--s{level});color:var(--i{level})}}" for level in range(LEVELS)
    ]
    return ":root{" + "".join(lines) + "}\n" + "".join(cells)


def _levels(colours: Colormap) -> list[str]:
    return [to_hex(colours(position)) for position in np.linspace(0.0, 1.0, LEVELS)]


def summary_tiles(study: Study) -> list[Tile]:
    """Returns the numbers at the head of the page: paired divergence and the last layer's."""
    student = study.models[1].statistics
    before = study.models[2].statistics if len(study.models) > 2 else None
    tiles = []
    if study.pairs:
        earlier = "" if study.before is None else f"{study.before.paired_mean(study.pairs):.3f}"
        tiles.append(
            Tile(
                title="Divergence of the paired layers",
                before=earlier,
                after=f"{study.after.paired_mean(study.pairs):.3f}",
                note=f"nats of at most 0.693, mean over {len(study.pairs)} framed cells",
            )
        )
    for statistic in STATISTICS:
        if statistic.key in LAST_LAYER:
            title, note = LAST_LAYER[statistic.key]
            earlier = "" if before is None else _last(statistic, before)
            after = _last(statistic, student)
            tiles.append(Tile(title=title, before=earlier, after=after, note=note))
    return tiles


def _last(statistic: Statistic, values: Mapping[str, PerLayer]) -> str:
    return shown_value(statistic, float(values[statistic.key][-1]))


def shown_value(statistic: Statistic, value: float) -> str:
    """Returns a number as readers want it: shares in percent, ranks and nats with few digits."""
    if statistic.scale == "share":
        return f"{100 * value:.1f}%"
    if statistic.scale == "log":
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    return f"{value:.3f}"


def short_path(path: str) -> str:
    """Returns the end of a path that says which model it is: without best or latest."""
    return "/".join(_model_folder(path).parts[-2:])


def shown_name(path: str) -> str:
    """Returns the same as it may be shown to anybody."""
    return short_path(public_path(str(_model_folder(path))))


def _model_folder(path: str) -> PurePosixPath:
    folder = PurePosixPath(path.replace("\\", "/"))
    while folder.name in ("best", "latest", "student") and folder.parent.name:
        folder = folder.parent
    return folder
