"""What the command ``report`` does: collects runs and scores, and writes the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distilllens.errors import ConfigError, UserError
from distilllens.report.arguments import ReportArguments
from distilllens.report.build import Evaluations, build_page
from distilllens.report.comparison.files import Scoreboard, build_scoreboard
from distilllens.report.device import usable_device
from distilllens.report.html import Drawings, Page, PageFigure, render_page
from distilllens.report.lens_map import entropy_csv, lens_map_csv
from distilllens.report.output import check_writable, wide_console, write_file
from distilllens.report.runs.maps import MapOptions, RunMaps, build_run_maps
from distilllens.report.runs.record import RunRecord, find_runs, read_runs, report_folder
from distilllens.report.runs.table import runs_to_rich
from distilllens.report.scores.load import (
    EVALUATIONS,
    Method,
    collect_scores,
    evaluation_folder,
    group_methods,
    known_choices,
    list_some,
)
from distilllens.report.scores.samples import collect_samples
from distilllens.report.scores.table import to_rich
from distilllens.report.watch import Watched, watch_runs

SAMPLES_PER_SET = 10
MOST_MAPS = 6
"""More runs than this have lens maps only with --lens: each loads a model."""


def report(arguments: ReportArguments) -> None:
    """Writes tables, figures and report.html, and prints the tables and the page's path.

    With ``--watch`` it does so again and again until the runs have ended.

    Args:
        arguments: Of the command line.

    Raises:
        ConfigError: No such device; a run or evaluation folder is missing.
        DataError: A malformed metrics line, result or sample, named by file and line.
        StorageError: The output folder cannot be written.
        KeyboardInterrupt: Ctrl-C; a watched page was written as it stands.
    """
    device = usable_device(arguments.device)
    console = wide_console()
    folders, notes = find_runs(arguments.runs, is_live=arguments.watch is not None)
    out = arguments.out or report_folder(folders)
    if arguments.watch is not None:
        check_writable(out)
        watch_runs(
            folders,
            seconds=arguments.watch,
            write=_LivePage(out, arguments).write,
            console=console,
        )
    _report(folders, out, arguments, device, console, notes)
    # Not through rich, which would break a long path into lines.
    print(out / "report.html")


def _report(
    folders: Sequence[Path],
    out: Path,
    arguments: ReportArguments,
    device: str,
    console: Console,
    notes: Sequence[str],
) -> None:
    """Writes everything once, and prints the tables."""
    runs = read_runs(folders)
    collect = _collect_evaluations if arguments.watch is None else _collect_what_is_there
    evaluations = collect(runs, arguments.eval, arguments)
    check_writable(out)
    maps, map_notes = _collect_maps(runs, arguments, device, console)
    page = build_page(runs, evaluations, maps, notes=[*notes, *map_notes], drawings=Drawings())
    _write_all(out, page, evaluations.scores, maps)
    for table in evaluations.scores.tables:
        console.print(to_rich(table))
    console.print(runs_to_rich(runs))
    for note in page.notes:
        console.print(f"note: {note}", markup=False)


class _LivePage:
    """The page of runs under way; evaluations are read again only when one was added or changed."""

    def __init__(self, out: Path, arguments: ReportArguments) -> None:
        self.out, self.arguments = out, arguments
        self.stamp: object = None
        self.evaluations = _no_evaluations()

    def write(self, watched: Watched) -> None:
        """Writes report.html, and nothing else."""
        folders = self.arguments.eval or _evaluation_folders(watched.runs)[0]
        found = [file for folder in folders for file in folder.rglob("results.json")]
        stamp = sorted((str(file), file.stat().st_mtime_ns) for file in found)
        if stamp != self.stamp:
            self.evaluations = _collect_what_is_there(
                watched.runs, folders if found else (), self.arguments
            )
            self.stamp = stamp
        page = build_page(
            watched.runs,
            self.evaluations,
            drawings=watched.drawings,
            waiting=watched.waiting,
            live_seconds=watched.live_seconds,
        )
        write_file(self.out / "report.html", _page_bytes(page))


def _collect_evaluations(
    runs: Sequence[RunRecord], folders: Sequence[Path] | None, arguments: ReportArguments
) -> Evaluations:
    methods, notes = _collect_methods(runs, folders)
    return _evaluations(
        methods,
        notes,
        build_scoreboard(methods, further=arguments.metrics, baseline=arguments.baseline),
    )


def _collect_what_is_there(
    runs: Sequence[RunRecord], folders: Sequence[Path] | None, arguments: ReportArguments
) -> Evaluations:
    """Does the same while runs go on: what is not there yet, or broken, is a note, no error."""
    try:
        methods, notes = _collect_methods(runs, folders)
        further, baseline, told = known_choices(methods, arguments.metrics, arguments.baseline)
        scores = build_scoreboard(methods, further=further, baseline=baseline)
        return _evaluations(methods, [*notes, *told], scores)
    except UserError as error:
        return _no_evaluations(f"no scores: {error.what}")


def _no_evaluations(*notes: str) -> Evaluations:
    return Evaluations(scores=build_scoreboard([]), samples=(), teachers=(), notes=notes)


def _evaluations(
    methods: Sequence[Method], notes: Sequence[str], scores: Scoreboard
) -> Evaluations:
    sets = scores.tables[0].sets if scores.tables else ()
    samples = collect_samples(methods, sets=sets, count=SAMPLES_PER_SET)
    return Evaluations(
        scores=scores,
        samples=samples,
        teachers={method.label for method in methods if method.is_teacher},
        notes=notes,
    )


def _collect_methods(
    runs: Sequence[RunRecord], folders: Sequence[Path] | None
) -> tuple[list[Method], list[str]]:
    """Returns the methods of the given folders, or of where the runs' evaluations lie."""
    teachers = {folder.resolve() for run in runs for folder in teacher_evaluations(run)}
    if folders is not None:
        methods = group_methods(collect_scores(folders), teachers=teachers)
        if folders and not methods:
            listed = ", ".join(str(folder) for folder in folders)
            raise ConfigError(
                f"no results.json below {listed}", fix="python evaluate.py …, or leave --eval out"
            )
        return methods, []
    found, notes = _evaluation_folders(runs)
    methods = group_methods(collect_scores(found), teachers=teachers)
    return methods, notes


def _evaluation_folders(runs: Sequence[RunRecord]) -> tuple[list[Path], list[str]]:
    """Returns where the evaluations of the runs and of their teachers lie, teachers first.

    And a note of those runs that have none.
    """
    teachers = [folder for run in runs for folder in teacher_evaluations(run)]
    found, missing, elsewhere = [], {}, []
    for run in runs:
        mirrored = evaluation_folder(run.folder)
        if mirrored is None:
            elsewhere.append(run.label)
        elif mirrored.is_dir():
            found.append(mirrored)
        else:
            missing[run.label] = str(mirrored)
    notes = []
    if missing:
        place = os.path.commonpath(missing.values())
        notes.append(f"{list_some(missing)}: no scores, nothing at {place}")
    if elsewhere:
        notes.append(
            f"{list_some(elsewhere)}: no scores: the runs are not below results/train; "
            "name evaluations with --eval"
        )
    return list(dict.fromkeys([*teachers, *found])), notes


def teacher_evaluations(run: RunRecord) -> list[Path]:
    """Returns the folders with scores of a run's teacher, if it was evaluated.

    A teacher that was trained here has them where any run has; one that was given has them in
    results/eval_main/CKPT/given/NAME, beside those of the run's own CKPT (not of a sweep's run).
    """
    if run.config.model.teacher is None:
        return []
    teacher = Path(run.config.model.teacher)
    own, candidates = evaluation_folder(run.folder), []
    if (trained := evaluation_folder(teacher.parent.resolve())) is not None:
        candidates.append(trained)
    for folder in (own, *own.parents) if own is not None else ():
        if folder.parent.name == EVALUATIONS:
            candidates.append(folder / "given" / teacher.name)
            break
    return [folder for folder in candidates if folder.is_dir()]


def _collect_maps(
    runs: Sequence[RunRecord], arguments: ReportArguments, device: str, console: Console
) -> tuple[list[RunMaps], list[str]]:
    if arguments.no_lens or (arguments.watch is not None and not arguments.lens):
        return [], []
    if len(runs) > MOST_MAPS and not arguments.lens:
        return [], [f"no lens maps of {len(runs)} runs, more than {MOST_MAPS}: --lens draws them"]
    options = MapOptions(
        data=arguments.data,
        prompts=arguments.prompts,
        tokens=arguments.tokens,
        teacher=arguments.teacher,
        device=device,
        required=arguments.lens,
    )
    return build_run_maps(runs, options, console)


def _write_all(out: Path, page: Page, scores: Scoreboard, maps: Sequence[RunMaps]) -> None:
    """Writes every file of the report; report.html last, so that it never stands alone."""
    files = scores.files()
    figures: list[PageFigure] = [*page.score_figures]
    for group in page.curves:
        figures += group.figures
    for section in page.lens:
        figures += [*section.maps, section.entropy]
    files |= {f"{figure.name}.png": figure.light_png for figure in figures}
    for number, run_maps in enumerate(maps, start=1):
        csv = lens_map_csv(run_maps.before, run_maps.after)
        files[f"lens_map_{number}.csv"] = csv.encode()
        entropies = entropy_csv(run_maps.before, run_maps.after)
        files[f"lens_map_{number}_entropy.csv"] = entropies.encode()
    files["report.html"] = _page_bytes(page)
    for name, content in files.items():
        write_file(out / name, content)


def _page_bytes(page: Page) -> bytes:
    """Returns the page as a file has it."""
    # A lone surrogate out of a broken sample cannot be UTF-8.
    return render_page(page).encode(errors="backslashreplace")
