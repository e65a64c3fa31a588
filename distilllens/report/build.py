"""Puts a report's page together from runs, their evaluations and lens maps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from distilllens.report.comparison.files import Scoreboard
from distilllens.report.comparison.tables import difference_tables
from distilllens.report.html import Drawings, FigureGroup, LensSection, Live, Page
from distilllens.report.lens.plots import colour_limit, lens_panels
from distilllens.report.plots import Panel, curve_panels, layer_panels, score_panel
from distilllens.report.runs.differences import compare_configurations
from distilllens.report.runs.groups import RunGroup, group_runs
from distilllens.report.runs.maps import RunMaps
from distilllens.report.runs.progress import HEADER, Progress, progress_of
from distilllens.report.runs.record import RunRecord
from distilllens.report.runs.table import run_rows
from distilllens.report.scores.load import Method, prompt_counts
from distilllens.report.scores.samples import SampleSet
from distilllens.report.scores.table import ScoreTable
from distilllens.report.style import line_style
from distilllens.report.tables import TextTable


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """What evaluate.py left, as the page shows it."""

    scores: Scoreboard
    samples: Sequence[SampleSet]
    teachers: Collection[str]
    """Labels of the methods that are teachers of the runs."""
    notes: Sequence[str]
    """Beside those of the scores."""


def build_page(
    runs: Sequence[RunRecord],
    evaluations: Evaluations,
    maps: Sequence[RunMaps] = (),
    *,
    notes: Sequence[str] = (),
    drawings: Drawings,
    waiting: Sequence[Progress] = (),
    live_seconds: float | None = None,
) -> Page:
    """Returns the page of some runs.

    Args:
        runs: In the order of their colours.
        evaluations: Of these runs.
        maps: Of those runs that have them.
        notes: What a reader must know first, beside the notes of the evaluations.
        drawings: Keeps the figures that are already drawn.
        waiting: Rows of runs that cannot be read yet.
        live_seconds: The page loads itself again so often; None: it stays as it is.
    """
    methods, tables = evaluations.scores.methods, evaluations.scores.tables
    groups = group_runs(runs)
    position = {run.folder: at for at, group in enumerate(groups) for run in group.runs}
    score_panels = [score_panel(table) for table in tables[:1]]
    commits = sorted({str(run.environment.get("git_commit") or "unknown")[:12] for run in runs})
    now = datetime.now(UTC)
    live = None if live_seconds is None else Live(seconds=live_seconds, written=f"{now:%H:%M:%S}")
    labels = [run.label for run in runs]
    return Page(
        title="DistillLens report" + (f": {_join(labels)}" if 0 < len(labels) <= 4 else ""),
        subtitle=_subtitle(runs, groups, evaluations),
        notes=[*evaluations.notes, *evaluations.scores.notes, *notes],
        progress_header=HEADER,
        progress=[row.cells() for row in (*(progress_of(run) for run in runs), *waiting)],
        run_styles=[line_style(position[run.folder]) for run in runs],
        tables=tables,
        prompt_counts=prompt_counts(methods),
        score_figures=[drawings.render(panel) for panel in score_panels if panel is not None],
        comparisons=_comparisons(evaluations.scores),
        group_labels=[group.label for group in groups],
        group_styles=[line_style(at) for at in range(len(groups))],
        curves=_figure_groups(groups, drawings),
        lens=_lens_sections(maps, drawings),
        differences=compare_configurations(groups),
        run_labels=labels,
        run_rows=run_rows(runs),
        samples=evaluations.samples,
        teachers=evaluations.teachers,
        explanations=_explanations(groups, methods, tables, maps),
        footer=f"Written {now:%Y-%m-%d %H:%M} UTC. "
        + (f"Runs trained at commit {_join(commits)}. " if commits else "")
        + "This page loads nothing from anywhere.",
        live=live,
    )


def _comparisons(scores: Scoreboard) -> list[tuple[str, TextTable, list[str]]]:
    tables: list[tuple[str, TextTable, list[str]]] = [
        (table.title(), table, [])
        for content in scores.comparisons[:1]  # of Rouge-L; comparisons.md has all
        for table in difference_tables(content)
    ]
    if scores.paper.rows:
        tables.append(("Beside the paper's Table 1", scores.paper, scores.paper.differences))
    return tables


def _subtitle(
    runs: Sequence[RunRecord], groups: Sequence[RunGroup], evaluations: Evaluations
) -> str:
    methods, tables = evaluations.scores.methods, evaluations.scores.tables
    parts = [_count(runs, "run")]
    if len(groups) < len(runs):
        parts.append(f"{len(groups)} configurations, seeds taken together")
    if methods:
        sets = tables[0].sets if tables else ()
        seeds = sorted({score.sampling_seed for method in methods for score in method.scores})
        parts += [
            f"{_count(methods, 'method')} × {_count(sets, 'set')}",
            f"sampling seeds {_join(seeds)}",
        ]
    return " · ".join(parts)


SECTIONS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Losses", lambda key: key.startswith("train/loss") and key != "train/loss_scale"),
    ("Dev set", lambda key: key.startswith("eval/")),
    ("Speed and memory", lambda key: key.startswith("perf/")),
    ("Optimizer and schedules", lambda key: True),
)
"""Headings of the curves, and which metrics stand below each; the first that fits."""


def _figure_groups(groups: Sequence[RunGroup], drawings: Drawings) -> list[FigureGroup]:
    """Draws the curves and the maps by layer, under their headings."""
    sections: dict[str, list[Panel]] = {title: [] for title, _ in SECTIONS}
    for curve, panel in curve_panels(groups):
        title = next(title for title, fits in SECTIONS if fits(curve.key))
        sections[title].append(panel)
    losses, dev, speed, optimizer = sections.items()
    ordered = [losses, dev, ("By layer over the steps", layer_panels(groups)), optimizer, speed]
    return [
        FigureGroup(title=title, figures=[drawings.render(panel) for panel in panels])
        for title, panels in ordered
        if panels
    ]


def _lens_sections(maps: Sequence[RunMaps], drawings: Drawings) -> list[LensSection]:
    """Draws all maps; runs from one initial student share their colour scales."""
    sections = []
    for number, run_maps in enumerate(maps, start=1):
        run, before, after = run_maps.run, run_maps.before, run_maps.after
        kin = [other for other in maps if other.origin == run_maps.origin]
        every = [lens_map for other in kin for lens_map in (other.before, other.after)]
        largest = colour_limit([lens_map.divergence_ST for lens_map in every])
        largest_change = colour_limit([m.after.divergence_ST - m.before.divergence_ST for m in kin])
        panels = lens_panels(
            run_maps.before,
            run_maps.after,
            pairs=run.pairs,
            largest=largest,
            largest_change=largest_change,
            prefix=f"lens_map_{number}",
        )
        *map_figures, entropy = [drawings.render(panel) for panel in panels]
        means = f"{before.paired_mean(run.pairs):.3f} → {after.paired_mean(run.pairs):.3f}"
        origin = "" if run_maps.own_teacher else " (the run was trained without it)"
        sections.append(
            LensSection(
                label=run.label,
                caption=f"Teacher {run_maps.teacher}{origin}, student {run.config.model.student} "
                f"before and best/ after; {after.num_tokens} of {after.num_available} response "
                f"tokens of the first {run_maps.num_prompts} usable records of {run_maps.data}. "
                "Mean over tokens; the colour scale is the same in all maps that begin with this "
                "student.",
                paired=means if run.pairs else "",
                num_pairs=len(run.pairs),
                maps=map_figures,
                entropy=entropy,
            )
        )
    return sections


def _explanations(
    groups: Sequence[RunGroup],
    methods: Sequence[Method],
    score_tables: Sequence[ScoreTable],
    maps: Sequence[RunMaps],
) -> list[str]:
    lines = []
    if methods:
        units = sorted({row.unit for row in score_tables[0].rows})
        lines += [
            "Rouge-L: F1 with stemming, the best over a prompt's references, mean over prompts "
            "× 100. Exact match: share of prompts whose answer equals a reference after "
            "normalisation, × 100.",
            f"n counts {_join(units)}. A method trained once has one value per sampling seed. A "
            "method trained with several seeds has one value per training seed, the mean over its "
            "sampling seeds.",
            "± is the sample standard deviation (n − 1) over these values; a single value has "
            "none. It tells the spread of one measurement, not the error of the mean.",
            "The average is the mean over sets within one seed, then mean and standard deviation "
            "over the seeds that have every set. A dash is a cell that was not measured; it "
            "enters no mean.",
        ]
    lines.append(
        "Curves come from each run's metrics.jsonl alone, best dev loss is the smallest "
        "eval/dev/loss in it. A cross at the foot of a panel is a value that was not finite."
    )
    if any(len(group.runs) > 1 for group in groups):
        lines.append(
            "Runs that differ in their seed alone are one line: the mean over those that logged "
            "the step, in a band from the least to the most of them."
        )
    if maps:
        lines += [
            "Lens maps: Jensen–Shannon divergence with β = 0.5 in nats, float32, at the positions "
            "that predict a token of the reference answer (teacher forcing), the text's first "
            "reference; tokens are spread evenly over all answers, the same for both models.",
            "Entropy: of each block's lens distribution in nats, mean over the same tokens.",
        ]
    return lines


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _join(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
