"""Tables of methods × test sets: mean ± sample standard deviation over seeds, n beside it.

What counts as one independent value (a *unit*) depends on the runs. A method trained once gives
one value per sampling seed. A method trained with several seeds gives one value per training seed,
the mean over its sampling seeds: samples drawn from one training run do not repeat the training.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from rich.table import Table

from distilllens.report.scores import Method

MISSING = "–"
METRIC_TITLES = {"rougeL": "Rouge-L", "exact_match": "Exact match (%)"}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean and spread of the values of one cell, at least one value."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation (n − 1 below the fraction); None for a single value."""
        # numpy, because statistics.stdev fails on NaN.
        return float(np.std(self.values, ddof=1)) if self.n > 1 else None

    def format(self) -> str:
        """Returns ``21.12 ± 0.40``, or ``21.12`` where there is no spread to tell."""
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method of a table."""

    label: str
    cells: Mapping[str, Summary | None]
    """By test set; None where the method was not scored."""
    average: Summary | None
    """Over the units that have every set; None where there is none."""
    unit: str
    """What n counts: sampling or training seeds."""

    @property
    def summaries(self) -> list[Summary]:
        """Every cell that has values, the average last."""
        return [cell for cell in (*self.cells.values(), self.average) if cell is not None]

    @property
    def n(self) -> int:
        """The largest number of seeds of any cell; 0 for a row without values."""
        return max((summary.n for summary in self.summaries), default=0)

    def format_n(self) -> str:
        """Returns the n of the row, as a range where its cells differ."""
        counts = [summary.n for summary in self.summaries]
        if not counts:
            return "0"
        return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"

    def format_cell(self, summary: Summary | None) -> str:
        """Returns a cell's text; its own n is added where it is smaller than the row's."""
        if summary is None:
            return MISSING
        return summary.format() + (f" (n={summary.n})" if summary.n != self.n else "")


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """One metric of all methods on all sets."""

    metric: str
    sets: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The metric's name for readers."""
        return METRIC_TITLES.get(self.metric, self.metric)

    @property
    def has_average(self) -> bool:
        """Whether an average over sets says more than the single set's column."""
        return len(self.sets) > 1

    def header(self) -> list[str]:
        """Returns the column titles."""
        return ["method", "n", *self.sets, *(["average"] if self.has_average else [])]

    def lines(self) -> list[list[str]]:
        """Returns the formatted cells, a list per row, as long as the header."""
        return [
            [
                row.label,
                row.format_n(),
                *(row.format_cell(row.cells[name]) for name in self.sets),
                *([row.format_cell(row.average)] if self.has_average else []),
            ]
            for row in self.rows
        ]


def build_table(
    methods: Sequence[Method], *, metric: str = "rougeL", sets: Sequence[str] | None = None
) -> ScoreTable:
    """Builds the table of one metric.

    Args:
        methods: Rows, in this order; a method without scores becomes a row of dashes.
        metric: Key of results.json's metrics.
        sets: Columns, in this order; default: every set that occurs, in order of appearance.

    Returns:
        The table; nothing in it is rounded before it is formatted.
    """
    if sets is None:
        sets = list(dict.fromkeys(s.test_set for method in methods for s in method.scores))
    rows = tuple(_build_row(method, metric=metric, sets=sets) for method in methods)
    return ScoreTable(metric=metric, sets=tuple(sets), rows=rows)


def _build_row(method: Method, *, metric: str, sets: Sequence[str]) -> Row:
    training_seeds = {score.training_seed for score in method.scores}
    by_training = len(training_seeds) > 1
    draws: dict[str, dict[int | None, list[float]]] = {name: defaultdict(list) for name in sets}
    for score in method.scores:
        unit = score.training_seed if by_training else score.sampling_seed
        if score.test_set in draws:
            draws[score.test_set][unit].append(score.metrics[metric])
    values = {
        name: {unit: statistics.fmean(drawn) for unit, drawn in units.items()}
        for name, units in draws.items()
    }
    complete = set.intersection(*(set(units) for units in values.values())) if values else set()
    averages = [
        statistics.fmean(values[name][unit] for name in sets)
        for unit in sorted(complete, key=lambda unit: -1 if unit is None else unit)
    ]
    return Row(
        label=method.label,
        cells={name: _summarise(list(values[name].values())) for name in sets},
        average=_summarise(averages),
        unit="training seeds" if by_training else "sampling seeds",
    )


def _summarise(values: Sequence[float]) -> Summary | None:
    return Summary(values=tuple(values)) if values else None


class TextTable(Protocol):
    """What can be written as Markdown, LaTeX and on a screen."""

    def header(self) -> list[str]:
        """Returns the column titles."""
        ...

    def lines(self) -> list[list[str]]:
        """Returns the formatted cells, a list per row, as long as the header."""
        ...


def to_markdown(table: TextTable, *, bold: Collection[tuple[int, int]] = ()) -> str:
    """Returns the table as a GitHub Markdown table, numbers right-aligned.

    Args:
        table: Header and lines.
        bold: Cells (line, column) that stand out, counted from 0 below the header.
    """
    header = table.header()
    body = [
        [f"**{cell}**" if (row, column) in bold else cell for column, cell in enumerate(line)]
        for row, line in enumerate(table.lines())
    ]
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *body]
    escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in escaped) + "\n"


LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "Δ": r"$\Delta$", "†": r"$^\dagger$", "–": "--", "−": "$-$", "→": r"$\to$"}
)
"""How characters are written that LaTeX takes for commands, or that its fonts lack."""


def to_latex(table: TextTable, *, bold: Collection[tuple[int, int]] = ()) -> str:
    """Returns the table as a LaTeX tabular (package booktabs), numbers right-aligned.

    Args:
        table: Header and lines.
        bold: Cells (line, column) that stand out, counted from 0 below the header.
    """
    header = [cell.translate(LATEX) for cell in table.header()]
    body = [[cell.translate(LATEX) for cell in line] for line in table.lines()]
    for row, column in bold:
        body[row][column] = rf"\textbf{{{body[row][column]}}}"
    rows = [" & ".join(line) + r" \\" for line in (header, *body)]
    top = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", rows[0], r"\midrule"]
    return "\n".join([*top, *rows[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_csv(tables: Sequence[ScoreTable]) -> str:
    """Returns all tables as one CSV, a line per cell, in full precision.

    Columns: metric, method, set, mean, sd, n, unit. Missing cells have an empty mean and n = 0;
    a single seed has an empty sd. The set ``average`` is the mean over all sets.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["metric", "method", "set", "mean", "sd", "n", "unit"])
    for table in tables:
        for row in table.rows:
            cells = dict(row.cells) | ({"average": row.average} if table.has_average else {})
            for name, cell in cells.items():
                mean = "" if cell is None else repr(cell.mean)
                sd = "" if cell is None or cell.sd is None else repr(cell.sd)
                n = 0 if cell is None else cell.n
                writer.writerow([table.metric, row.label, name, mean, sd, n, row.unit])
    return buffer.getvalue()


def to_rich(table: ScoreTable) -> Table:
    """Returns the table for a terminal."""
    return rich_table(table, title=f"{table.title}: mean ± sd over n seeds")


def rich_table(table: TextTable, *, title: str) -> Table:
    """Returns any such table for a terminal."""
    shown = Table(title=title, title_justify="left")
    for position, name in enumerate(table.header()):
        shown.add_column(name, justify="right" if position else "left", overflow="fold")
    for line in table.lines():
        shown.add_row(*line)
    return shown
