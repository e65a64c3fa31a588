"""Tables of methods × test sets: mean ± sample standard deviation over seeds, n beside it.

What counts as one independent value (a *unit*) depends on the runs. A method trained once gives
one value per sampling seed. A method trained with several seeds gives one value per training seed,
the mean over its sampling seeds: samples drawn from one training run do not repeat the training.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from rich.table import Table

from distilllens.report.scores.load import Method, prompt_counts
from distilllens.report.scores.metrics import metric_of
from distilllens.report.tables import MISSING, Marks, mark_column, rich_table

FIRST_SCORE = 2
"""Column of the first score: the method's label and n come before."""


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
    competes: bool = True
    """Whether it may be the best: a teacher beside its students does not."""

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

    text_columns: ClassVar[tuple[int, ...]] = (0,)

    metric: str
    sets: tuple[str, ...]
    rows: tuple[Row, ...]
    prompts: Mapping[str, int] = field(default_factory=dict)
    """Number of prompts of each set, told in its column's title where it is known."""
    not_averaged: tuple[str, ...] = ()
    """Sets that do not enter the average."""

    @property
    def title(self) -> str:
        """The metric's name for readers."""
        return metric_of(self.metric).title

    @property
    def averaged(self) -> tuple[str, ...]:
        """The sets that the average is over."""
        return tuple(name for name in self.sets if name not in self.not_averaged)

    @property
    def has_average(self) -> bool:
        """Whether an average over sets says more than the single set's column."""
        return len(self.averaged) > 1

    def header(self) -> list[str]:
        """Returns the column titles."""
        sets = [f"{name} ({self.prompts[name]:,})" if name in self.prompts else name
                for name in self.sets]  # fmt: skip
        return ["method", "n", *sets, *(["average"] if self.has_average else [])]

    def marks(self) -> Marks:
        """Returns the best and second best mean of each column of scores (see `mark_column`)."""
        columns = [[row.cells[name] for row in self.rows] for name in self.sets]
        columns += [[row.average for row in self.rows]] if self.has_average else []
        marked = Marks()
        for position, cells in enumerate(columns, start=FIRST_SCORE):
            means = {
                line: cell.mean
                for line, (row, cell) in enumerate(zip(self.rows, cells, strict=True))
                if cell is not None and row.competes
            }
            marked |= mark_column(means, position, better=metric_of(self.metric).better)
        return marked

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
    methods: Sequence[Method],
    *,
    metric: str = "rougeL",
    sets: Sequence[str] | None = None,
    averaged: Sequence[str] | None = None,
) -> ScoreTable:
    """Builds the table of one metric.

    Args:
        methods: Rows, in this order; a method without scores becomes a row of dashes.
        metric: Key of results.json's metrics.
        sets: Columns, in this order; default: every set that occurs, in order of appearance.
        averaged: Those of them that the average is over; default: all.

    Returns:
        The table; nothing in it is rounded before it is formatted.
    """
    if sets is None:
        sets = list(dict.fromkeys(s.test_set for method in methods for s in method.scores))
    averaged = sets if averaged is None else averaged
    rows = tuple(
        _build_row(method, metric=metric, sets=sets, averaged=averaged) for method in methods
    )
    counts = prompt_counts(methods)
    prompts = {name: counts[name] for name in sets if name in counts}
    return ScoreTable(
        metric=metric,
        sets=tuple(sets),
        rows=rows,
        prompts=prompts,
        not_averaged=tuple(name for name in sets if name not in averaged),
    )


def _build_row(method: Method, *, metric: str, sets: Sequence[str], averaged: Sequence[str]) -> Row:
    by_unit = method.by_unit(metric)
    values = {name: by_unit.get(name, {}) for name in sets}
    return Row(
        label=method.label,
        cells={name: _summarise(list(values[name].values())) for name in sets},
        average=_summarise(
            list(average_by_unit({name: values[name] for name in averaged}).values())
        ),
        unit="training seeds"
        if method.by_training or metric_of(metric).once_per_set
        else "sampling seeds",
        competes=not method.is_given,
    )


def average_by_unit(values: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Returns the mean over all sets of each unit that has every set, the units in order."""
    complete = set.intersection(*(set(units) for units in values.values())) if values else set()
    return {
        unit: statistics.fmean(units[unit] for units in values.values())
        for unit in sorted(complete)
    }


def _summarise(values: Sequence[float]) -> Summary | None:
    return Summary(values=tuple(values)) if values else None


def to_csv(tables: Sequence[ScoreTable]) -> str:
    """Returns all tables as one CSV, a line per cell, in full precision.

    Columns: metric, method, set, mean, sd, n, unit, prompts. Missing cells have an empty mean and
    n = 0; a single seed has an empty sd. The set ``average`` is the mean over the table's averaged
    sets; prompts is the number of the set's, of the average that of its sets, empty where it is
    not known.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["metric", "method", "set", "mean", "sd", "n", "unit", "prompts"])
    for table in tables:
        counts = dict(table.prompts)
        if counts and table.has_average:
            counts["average"] = sum(counts.get(name, 0) for name in table.averaged)
        for row in table.rows:
            cells = dict(row.cells) | ({"average": row.average} if table.has_average else {})
            for name, cell in cells.items():
                mean = "" if cell is None else repr(cell.mean)
                sd = "" if cell is None or cell.sd is None else repr(cell.sd)
                n = 0 if cell is None else cell.n
                prompts = counts.get(name, "")
                writer.writerow([table.metric, row.label, name, mean, sd, n, row.unit, prompts])
    return buffer.getvalue()


def to_rich(table: ScoreTable) -> Table:
    """Returns the table for a terminal."""
    return rich_table(table, title=f"{table.title}: mean ± sd over n seeds")
