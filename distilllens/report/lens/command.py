"""What the command ``lens`` does: reads the models, and writes the page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from distilllens.config import ModelConfig
from distilllens.errors import ConfigError
from distilllens.layers import LayerPair
from distilllens.lens_matrix import LensMap
from distilllens.public import public_command
from distilllens.report.device import usable_device
from distilllens.report.lens.curves import plot_statistic
from distilllens.report.lens.files import (
    divergence_csv,
    layers_csv,
    study_document,
    tokens_csv,
)
from distilllens.report.lens.page import render_lens_page, short_path, shown_value
from distilllens.report.lens.plots import colour_limit, plot_lens_change, plot_lens_map
from distilllens.report.lens.statistics import STATISTICS, Statistic
from distilllens.report.lens.study import Source, Study, StudySettings, build_study
from distilllens.report.lens.token_map import SampleReadings, plot_token_map
from distilllens.report.output import check_writable, write_file
from distilllens.report.plots import Panel
from distilllens.report.runs.record import RunRecord, read_runs
from distilllens.report.style import LIGHT, figure_png, figure_svg

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_lens_report(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """Reads the models through their lenses, writes the report, and prints the page's path.

    Args:
        arguments: Of `parse_lens_arguments`.
        options: As they were typed, for the page's footer.

    Raises:
        ConfigError: A model is missing or broken, or shares no tokens with the others; no such
            device.
        DataError: A missing file, a malformed record, no usable record.
        StorageError: The output folder cannot be written.
    """
    settings = _settings(arguments, usable_device(arguments.device))
    out = arguments.out or default_folder(settings)
    figures = out / "figures"
    for folder in (out, figures):
        check_writable(folder)
    console = Console()
    study = build_study(settings, console)
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    command = f"python -m distilllens lens {shlex.join(public_command(options))}"
    document = study_document(study)
    page = render_lens_page(study, document, footer=f"Written {written} by {command}.")
    for panel in study_panels(study):
        figure = panel.draw(LIGHT)
        write_file(figures / f"{panel.name}.png", figure_png(figure))
        write_file(figures / f"{panel.name}.svg", figure_svg(figure, outlines=True))
    write_file(out / "layers.csv", layers_csv(study).encode())
    write_file(out / "divergence.csv", divergence_csv(study).encode())
    if study.samples:
        write_file(out / "tokens.csv", tokens_csv(study).encode())
    write_file(out / "lens.json", (json.dumps(document, allow_nan=False) + "\n").encode())
    write_file(out / "lens.html", page.encode())
    console.print(_last_layers(study))
    # Not through rich, which would break a long path into lines.
    print(f"{out / 'lens.html'} ({len(page.encode()) / 1e6:.2f} MB)")


def _settings(arguments: argparse.Namespace, device: str) -> StudySettings:
    """Joins the options with what the run says; options win."""
    run = None if arguments.run is None else read_runs([arguments.run])[0]
    teacher, student, before, data = (
        arguments.teacher,
        arguments.student,
        arguments.before,
        arguments.data,
    )
    teacher_lora, pairs = arguments.teacher_lora, tuple[LayerPair, ...]()
    max_length, max_prompt_length = 512, 256
    if run is not None:
        model = run.config.model
        if teacher is None:
            teacher, teacher_lora = model.teacher, teacher_lora or model.teacher_lora
        student, before = student or _best_of(run), before or model.student
        data = data or Path(run.config.data.path) / "valid.jsonl"
        max_length = run.config.data.max_length
        max_prompt_length = run.config.data.max_prompt_length
        pairs = run.pairs
    for name, value in (("teacher", teacher), ("student", student), ("data", data)):
        if value is None:
            raise ConfigError(
                f"--{name} is missing",
                why="the run names none" if run else "",
                fix="give --teacher, --student and --data, or a training run with --run",
            )
    sources = [Source(role="teacher", path=teacher, lora=teacher_lora)]
    sources.append(Source(role="student", path=student, lora=arguments.student_lora))
    if before is not None:
        sources.append(Source(role="before", path=before))
    if run is not None:
        sources = [_as_in_run(source, run.config.model) for source in sources]
    return StudySettings(
        sources=tuple(sources),
        pairs=pairs,
        data=data,
        prompts=arguments.prompts,
        tokens=arguments.tokens,
        show=arguments.show,
        show_tokens=arguments.show_tokens,
        answers=arguments.answers,
        own_prompts=tuple(arguments.prompt),
        own_responses=tuple(arguments.response),
        max_length=arguments.max_length or max_length,
        max_prompt_length=arguments.max_prompt_length or max_prompt_length,
        device=device,
        dtype=DTYPES[arguments.dtype],
        attention=arguments.attention,
    )


def _as_in_run(source: Source, model: ModelConfig) -> Source:
    """Loads a model that the run names as the run loaded it; exported ones need neither."""
    if source.path not in (model.teacher, model.student):
        return source
    return dataclasses.replace(
        source, revision=model.revision, trust_remote_code=model.trust_remote_code
    )


def _best_of(run: RunRecord) -> str:
    best = run.folder / "best"
    if not best.is_dir():
        raise ConfigError(
            f"{best} not found",
            why="the run has no evaluated student yet",
            fix="name a student with --student, for example latest/ of the run",
        )
    return str(best)


def default_folder(settings: StudySettings) -> Path:
    """Returns results/lens/ and the end of the student's path, its folders joined by hyphens."""
    return Path("results/lens") / short_path(settings.sources[1].path).replace("/", "-")


def study_panels(study: Study) -> list[Panel]:
    """Returns every figure: divergence maps, a curve per statistic, a map per shown answer."""
    return [*_divergence_panels(study), *_curve_panels(study), *_token_panels(study)]


def _divergence_panels(study: Study) -> list[Panel]:
    before, after, pairs = study.before, study.after, study.pairs
    if before is None:
        largest = colour_limit([after.divergence_ST])
        return [_map_panel("after", "Student × teacher", after, pairs, largest)]
    largest = colour_limit([before.divergence_ST, after.divergence_ST])
    change = colour_limit([after.divergence_ST - before.divergence_ST])
    return [
        _map_panel("before", "Before training", before, pairs, largest),
        _map_panel("after", "After training", after, pairs, largest),
        Panel(
            name="divergence_change",
            alt="Change of the lens divergence by training",
            caption="After − before",
            draw=lambda theme: plot_lens_change(
                before, after, pairs=pairs, largest=change, theme=theme
            ),
        ),
    ]


def _map_panel(
    name: str, title: str, lens_map: LensMap, pairs: Sequence[LayerPair], largest: float
) -> Panel:
    return Panel(
        name=f"divergence_{name}",
        alt=f"Lens divergence of student blocks and teacher blocks: {title}",
        caption=title,
        draw=lambda theme: plot_lens_map(
            lens_map, title=title, pairs=pairs, largest=largest, theme=theme
        ),
    )


def _curve_panels(study: Study) -> list[Panel]:
    return [_curve_panel(study, statistic) for statistic in STATISTICS]


def _curve_panel(study: Study, statistic: Statistic) -> Panel:
    roles, labels = [m.role for m in study.models], [m.label for m in study.models]
    values = [model.statistics for model in study.models]
    return Panel(
        name=f"layers_{statistic.key}",
        alt=f"{statistic.title} of every layer of every model over depth",
        caption=statistic.meaning,
        draw=lambda theme: plot_statistic(statistic, roles, labels, values, theme=theme),
    )


def _token_panels(study: Study) -> list[Panel]:
    """Token maps; their colours have one scale, as those of the page."""
    readings = [model for shown in study.samples for model in shown.readings]
    largest = colour_limit([model.entropy_LN for model in readings])
    samples = enumerate(study.samples, start=1)
    return [_token_panel(study, number, shown, largest) for number, shown in samples]


def _token_panel(study: Study, number: int, shown: SampleReadings, largest: float) -> Panel:
    labels = [model.label for model in study.models]
    return Panel(
        name=f"tokens_{number}",
        alt=f"Likeliest token of every layer at every token: {shown.sample.title}",
        caption=shown.sample.title,
        draw=lambda theme: plot_token_map(
            shown, labels=labels, text_of=study.text_of, largest=largest, theme=theme
        ),
    )


def _last_layers(study: Study) -> Table:
    """Returns the last layers' numbers, for the screen."""
    table = Table(title=f"last layers, {study.after.num_tokens:,} held-out response tokens")
    table.add_column("statistic")
    for model in study.models:
        table.add_column(f"{model.label.lower()} ({model.num_layers} blocks)", justify="right")
    for statistic in STATISTICS:
        values = [float(model.statistics[statistic.key][-1]) for model in study.models]
        table.add_row(statistic.title, *(shown_value(statistic, value) for value in values))
    return table
