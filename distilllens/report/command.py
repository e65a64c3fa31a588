"""``python -m distilllens report RUN… [--eval DIR…] [--out DIR] [--data FILE] …``"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from distilllens.errors import ConfigError, StorageError
from distilllens.report.html import LensSection, Page, PageFigure, render_figure, render_page
from distilllens.report.lens_map import entropy_csv, lens_map_csv
from distilllens.report.lens_plots import colour_limit, lens_panels
from distilllens.report.plots import curve_panels, lens_layer_panels, score_panel
from distilllens.report.run_maps import MapOptions, RunMaps, build_run_maps
from distilllens.report.run_record import RunRecord, read_runs, report_folder
from distilllens.report.run_table import run_rows, runs_to_rich
from distilllens.report.samples import collect_samples
from distilllens.report.score_files import Scoreboard, build_scoreboard
from distilllens.report.scores import (
    Method,
    collect_scores,
    evaluation_folder,
    group_methods,
    prompt_counts,
)
from distilllens.report.tables import ScoreTable, to_rich

SAMPLES_PER_SET = 10
EPILOG = (
    "RUN is a folder that train.py wrote. Without --eval, scores are looked for where "
    "evaluate.py puts them: results/eval_main/… for a run in results/train/…"
)


def report_main(argv: Sequence[str] | None = None) -> int:
    """Writes tables, figures and report.html, and prints the tables and the page's path.

    Args:
        argv: Arguments after ``report``; default: those of the process.

    Returns:
        0.

    Raises:
        ConfigError: Wrong usage; a run or evaluation folder is missing.
        DataError: A malformed metrics line, result or sample, named by file and line.
        StorageError: The output folder cannot be written.
    """
    arguments = _parse(argv)
    console = _console()
    runs = read_runs(arguments.runs)
    methods, notes = _collect_methods(runs, arguments.eval)
    scores = build_scoreboard(methods, further=arguments.metrics, baseline=arguments.baseline)
    out = arguments.out or report_folder(run.folder for run in runs)
    _check_writable(out)
    maps, map_notes = _collect_maps(runs, arguments, console)
    page = _build_page(runs, methods, scores.tables, maps, notes + scores.notes + map_notes)
    _write_all(out, page, scores, maps)
    for table in scores.tables:
        console.print(to_rich(table))
    console.print(runs_to_rich(runs))
    for note in page.notes:
        console.print(f"note: {note}", markup=False)
    # Not through rich, which would break a long path into lines.
    print(out / "report.html")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, fix="python -m distilllens report --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m distilllens report", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="training run folders")
    add("--eval", metavar="DIR", nargs="+", type=Path, help="evaluation folders, in table order")
    add("--metrics", metavar="NAME", nargs="+", default=[], help="more metrics of results.json, "
        "beside rougeL and exact_match")  # fmt: skip
    add("--baseline", metavar="LABEL", help="method of the tables that the others are compared "
        "with; default: sft, else the first")  # fmt: skip
    add("--out", metavar="DIR", type=Path, help="default: report/ beside the runs")
    add("--data", metavar="FILE", type=Path, help="held-out JSONL of the lens maps; default: "
        "valid.jsonl of the run's data")  # fmt: skip
    add("--prompts", metavar="N", type=int, default=64, help="records of the lens maps (64)")
    add("--tokens", metavar="N", type=int, default=512, help="response tokens of them (512)")
    add("--teacher", metavar="PATH", help="teacher for the maps of runs without one; default: "
        "the teacher of the other runs")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    lens = parser.add_mutually_exclusive_group()
    lens.add_argument("--lens", action="store_true", help="stop if a lens map cannot be drawn")
    lens.add_argument("--no_lens", action="store_true", help="draw no lens maps: loads no model")
    arguments = parser.parse_args(argv)
    for name in ("prompts", "tokens"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be ≥ 1")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"--device {arguments.device} cannot be used", why=first_line) from None
    return arguments


def _console() -> Console:
    """Returns a console that does not squeeze tables into 80 columns when it is a file or pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _collect_methods(
    runs: Sequence[RunRecord], folders: Sequence[Path] | None
) -> tuple[list[Method], list[str]]:
    """Returns the methods of the given folders, or of where the runs' evaluations lie."""
    if folders is not None:
        methods = group_methods(collect_scores(folders))
        if not methods:
            listed = ", ".join(str(folder) for folder in folders)
            raise ConfigError(
                f"no results.json below {listed}", fix="run evaluate.py, or leave --eval out"
            )
        return methods, []
    found, notes = [], []
    for run in runs:
        mirrored = evaluation_folder(run.folder)
        if mirrored is None or not mirrored.is_dir():
            where = mirrored or "results/eval_main: the run is not below a folder called train"
            notes.append(f"{run.label}: no scores, nothing at {where}")
        else:
            found.append(mirrored)
    methods = group_methods(collect_scores(found))
    return methods, notes


def _collect_maps(
    runs: Sequence[RunRecord], arguments: argparse.Namespace, console: Console
) -> tuple[list[RunMaps], list[str]]:
    if arguments.no_lens:
        return [], []
    if arguments.data is not None and not arguments.data.is_file():
        raise ConfigError(f"--data {arguments.data}: no such file")
    options = MapOptions(
        data=arguments.data,
        prompts=arguments.prompts,
        tokens=arguments.tokens,
        teacher=arguments.teacher,
        device=arguments.device,
        required=arguments.lens,
    )
    return build_run_maps(runs, options, console)


def _build_page(
    runs: Sequence[RunRecord],
    methods: Sequence[Method],
    score_tables: Sequence[ScoreTable],
    maps: Sequence[RunMaps],
    notes: Sequence[str],
) -> Page:
    score_panels = [score_panel(table) for table in score_tables[:1]]
    sets = score_tables[0].sets if score_tables else ()
    seeds = sorted({score.sampling_seed for method in methods for score in method.scores})
    labels = [run.label for run in runs]
    parts = [f"{len(runs)} run{'s' if len(runs) != 1 else ''}"]
    if methods:
        parts += [f"{len(methods)} methods × {len(sets)} sets", f"sampling seeds {_join(seeds)}"]
    commits = sorted({str(run.environment.get("git_commit") or "unknown") for run in runs})
    return Page(
        title="DistillLens report" + (f": {_join(labels)}" if len(labels) <= 4 else ""),
        subtitle=" · ".join(parts),
        notes=notes,
        tables=score_tables,
        prompt_counts=prompt_counts(methods),
        score_figures=[render_figure(panel) for panel in score_panels if panel is not None],
        curves=[render_figure(panel) for panel in (*curve_panels(runs), *lens_layer_panels(runs))],
        lens=_lens_sections(maps),
        run_labels=labels,
        run_rows=run_rows(runs),
        samples=collect_samples(methods, sets=sets, count=SAMPLES_PER_SET),
        explanations=_explanations(methods, score_tables, maps),
        footer=f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Runs trained at commit "
        f"{_join(commits)}. This page loads nothing from anywhere.",
    )


def _lens_sections(maps: Sequence[RunMaps]) -> list[LensSection]:
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
        *map_figures, entropy = [render_figure(panel) for panel in panels]
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
    methods: Sequence[Method], score_tables: Sequence[ScoreTable], maps: Sequence[RunMaps]
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
        "eval/dev/loss in it."
    )
    if maps:
        lines += [
            "Lens maps: Jensen–Shannon divergence with β = 0.5 in nats, float32, at the positions "
            "that predict a token of the reference answer (teacher forcing), the text's first "
            "reference; tokens are spread evenly over all answers, the same for both models.",
            "Entropy: of each block's lens distribution in nats, mean over the same tokens.",
        ]
    return lines


def _join(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


def _check_writable(out: Path) -> None:
    """Makes the output folder before minutes of work, not after."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _storage_error(out, error) from None
    if not os.access(out, os.W_OK):
        raise StorageError(f"{out} is not writable", fix="choose another folder with --out")


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}", why=str(error), fix="choose another folder with --out"
    )


def _write_all(out: Path, page: Page, scores: Scoreboard, maps: Sequence[RunMaps]) -> None:
    """Writes every file of the report; report.html last, so that it never stands alone."""
    files = scores.files()
    figures: list[PageFigure] = [*page.score_figures, *page.curves]
    for section in page.lens:
        figures += [*section.maps, section.entropy]
    files |= {f"{figure.name}.png": figure.light_png for figure in figures}
    for number, run_maps in enumerate(maps, start=1):
        csv = lens_map_csv(run_maps.before, run_maps.after)
        files[f"lens_map_{number}.csv"] = csv.encode()
        entropies = entropy_csv(run_maps.before, run_maps.after)
        files[f"lens_map_{number}_entropy.csv"] = entropies.encode()
    # A lone surrogate out of a broken sample cannot be UTF-8.
    files["report.html"] = render_page(page).encode(errors="backslashreplace")
    for name, content in files.items():
        path = out / name
        temporary = out / f".{name}.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _storage_error(path, error) from None
