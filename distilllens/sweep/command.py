"""What the command ``sweep`` does: checks, trainings, scores, the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console

from distilllens.errors import EXIT_OK, ConfigError
from distilllens.report.output import wide_console
from distilllens.report.tables import rich_table
from distilllens.runs import create_run_folder, is_finished, shown_command
from distilllens.runtime.lock import locked
from distilllens.sweep.cells import (
    Cell,
    build_cells,
    differences_table,
    evaluate_command,
    evaluate_config,
    refused_options,
    train_command,
    unequal_budget,
)
from distilllens.sweep.jobs import Job, Runner, visible_gpus
from distilllens.sweep.results import Choice, choose_runs, read_results
from distilllens.sweep.scores import check_scores, is_scored
from distilllens.sweep.spec import Sweep, check_extra_flags, read_sweep
from distilllens.sweep.stored import check_stored
from distilllens.sweep.table import SweepTable


def run_sweep(arguments: argparse.Namespace, extra: Sequence[str]) -> int:
    """Trains and scores all methods with all seeds, and writes the table.

    Args:
        arguments: Of the command's parser.
        extra: Further flags, for every training.

    Returns:
        0; what a signal or a time limit that stopped it stands for; or the code of the first
        failure, after all others have run.

    Raises:
        ConfigError: Mistakes in the sweep file or in any configuration, methods with unequal
            budgets, folders that hold other trainings or scores: before anything starts.
        DataError: A folder holds what neither train.py nor evaluate.py writes.
        StorageError: The folder cannot be written.
    """
    sweep = read_sweep(arguments.file)
    sweep = _override(sweep, arguments)
    check_extra_flags(sweep, extra)
    console = wide_console()
    if arguments.table_only:
        _write_table(sweep, choose_runs(sweep), console)
        return EXIT_OK
    overwrite = arguments.overwrite_scores
    cells = _checked_cells(sweep, extra, console)
    if sweep.evaluation is not None and not overwrite:
        check_scores(sweep, cells)
    if arguments.dry_run:
        _print_commands(sweep, cells, overwrite=overwrite)
        return EXIT_OK
    with locked(create_run_folder(str(sweep.output_dir)).root / "sweep.lock"):
        return _run(sweep, cells, console, fail_fast=arguments.fail_fast, overwrite=overwrite)


def _override(sweep: Sweep, arguments: argparse.Namespace) -> Sweep:
    """Puts the command line's values in place of the file's.

    Raises:
        ConfigError: A number below 1, or more processes at once than this machine has GPUs.
    """
    for name in ("output_dir", "processes", "parallel"):
        value = getattr(arguments, name)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"--{name} {value} must be ≥ 1")
        if value is not None:
            sweep = replace(sweep, **{name: value})
    if not (arguments.dry_run or arguments.table_only):
        _check_gpus(sweep)
    return sweep


def _check_gpus(sweep: Sweep) -> None:
    """Refuses more processes at once than there are GPUs, if there are any.

    Raises:
        ConfigError: Names the flags that fit.
    """
    gpus = len(visible_gpus())
    if 0 < gpus < sweep.processes:
        times = sweep.processes / gpus
        raise ConfigError(
            f"{sweep.processes} processes for each training, but this machine has {gpus} GPUs",
            fix=f"--processes {gpus}, and {times:g} times the --optim.accumulation for the same "
            "records in a step",
        )
    if 0 < gpus < sweep.processes * sweep.parallel:
        raise ConfigError(
            f"{sweep.parallel} trainings at the same time × {sweep.processes} processes, but this "
            f"machine has {gpus} GPUs",
            fix=f"--parallel {gpus // sweep.processes}",
        )


def _checked_cells(sweep: Sweep, extra: Sequence[str], console: Console) -> list[Cell]:
    """Returns all cells, once nothing stands against starting them.

    Raises:
        ConfigError: Something does.
    """
    cells = build_cells(sweep, extra)
    if sweep.evaluation is not None:
        evaluate_config(sweep, cells[0].method, cells[0].lr, cells[0].seed)
    if len(sweep.lr) > 1 and cells[0].config.eval.dev_size == 0:
        raise ConfigError(
            "a grid of learning rates needs a dev set to choose by", fix="eval.dev_size ≥ 1"
        )
    if refused := refused_options(sweep, cells):
        console.print(differences_table(refused))
        raise unequal_budget(refused)
    check_stored(sweep, cells)
    return cells


def _print_commands(sweep: Sweep, cells: Sequence[Cell], *, overwrite: bool) -> None:
    for cell in cells:
        note = f"# {cell.label} is finished and skipped: " if is_finished(cell.folder) else ""
        print(note + shown_command(train_command(sweep, cell)))
    if sweep.evaluation is not None and len(sweep.lr) > 1:
        print("# of each method only the best learning rate is scored")
    for cell in cells if sweep.evaluation is not None else ():
        print(shown_command(evaluate_command(sweep, cell, overwrite=overwrite)))


def _run(
    sweep: Sweep, cells: Sequence[Cell], console: Console, *, fail_fast: bool, overwrite: bool
) -> int:
    runner = Runner(
        parallel=sweep.parallel, processes=sweep.processes, fail_fast=fail_fast, console=console
    )
    with runner.listening():
        waiting = [cell for cell in cells if not is_finished(cell.folder)]
        console.print(
            f"{len(cells)} trainings ({len(sweep.methods)} methods × {len(sweep.seeds)} seeds"
            f"{f' × {len(sweep.lr)} learning rates' if sweep.lr else ''}), "
            f"{len(cells) - len(waiting)} of them finished already",
            highlight=False,
        )
        runner.run([_train_job(sweep, cell) for cell in waiting])
        choices = choose_runs(sweep)
        if sweep.evaluation is not None and not runner.is_over:
            runner.run(_evaluation_jobs(sweep, cells, choices, overwrite=overwrite))
        _write_table(sweep, choices, console)
    for failure in runner.failures:
        print(
            f"{failure.label} failed with code {failure.code}; log: {failure.log}\n{failure.text}",
            file=sys.stderr,
        )
    if runner.stop_code:
        print("stopped; the same command goes on", file=sys.stderr)
        return runner.stop_code
    return runner.failures[0].code if runner.failures else EXIT_OK


def _train_job(sweep: Sweep, cell: Cell) -> Job:
    folder = cell.folder.root
    return Job(
        label=cell.label,
        command=tuple(train_command(sweep, cell)),
        screen=folder.with_name(f"{folder.name}.out"),
        prepared=cell.folder.data,
    )


def _evaluation_jobs(
    sweep: Sweep, cells: Sequence[Cell], choices: Mapping[str, Choice], *, overwrite: bool
) -> list[Job]:
    """Returns what is left to score of the finished trainings with the chosen learning rates."""
    by_place = {(cell.method, cell.lr, cell.seed): cell for cell in cells}
    jobs = []
    for method in sweep.methods:
        for cell in (by_place[method, run.lr, run.seed] for run in choices[method].runs):
            if not is_scored(evaluate_config(sweep, cell.method, cell.lr, cell.seed)):
                job = Job(
                    label=f"{cell.label}: scoring",
                    command=tuple(evaluate_command(sweep, cell, overwrite=overwrite)),
                    screen=cell.evaluation.with_name(f"{cell.evaluation.name}.out"),
                )
                jobs.append(job)
    return jobs


def _write_table(sweep: Sweep, choices: Mapping[str, Choice], console: Console) -> None:
    table = SweepTable(sweep, read_results(sweep, choices))
    written = table.write(sweep.output_dir)
    console.print(rich_table(table, title=f"Sweep {sweep.name}: {table.scores.title}"))
    for note in table.notes():
        console.print(f"- {note}", markup=False, highlight=False)
    # Not through rich, which would break a long path into lines.
    print(*written)
