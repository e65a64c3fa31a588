"""What a report knows of scores, computed once, and the files it writes of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from distilllens.report.comparison.methods import MetricComparison, compare_methods
from distilllens.report.comparison.paper import CITATION, PaperTable, build_paper_table, paper_notes
from distilllens.report.comparison.tables import comparisons_csv, comparisons_markdown
from distilllens.report.comparison.warnings import comparison_warnings
from distilllens.report.scores.load import (
    Method,
    choose_baseline,
    chosen_metrics,
    shared_sets,
    sort_sets,
)
from distilllens.report.scores.metrics import metric_of
from distilllens.report.scores.table import ScoreTable, build_table, to_csv
from distilllens.report.tables import escape_latex, to_latex, to_markdown


@dataclass(frozen=True, kw_only=True)
class Scoreboard:
    """Tables of all metrics, comparisons with the baseline, and the paper's figures."""

    methods: Sequence[Method]
    tables: Sequence[ScoreTable]
    """One for each metric."""
    comparisons: Sequence[MetricComparison]
    """One for each metric with samples; empty without any."""
    comparison_notes: Sequence[str]
    """What the comparisons are to, and what could not be compared."""
    paper: PaperTable

    @property
    def notes(self) -> list[str]:
        """What a reader must know before the figures, one sentence each."""
        warnings = [content.warning() for content in self.comparisons]
        return [
            *comparison_warnings(self.methods),
            *self.comparison_notes,
            *(warning for warning in warnings if warning),
        ]

    def files(self) -> dict[str, bytes]:
        """Returns scores.md, .csv and .tex, comparisons.md and .csv, paper.csv, as far as known."""
        if not self.tables:
            return {}
        files = {
            "scores.md": self._markdown(),
            "scores.csv": to_csv(self.tables),
            "scores.tex": self._latex(),
        }
        if self.comparisons:
            files["comparisons.md"] = comparisons_markdown(self.comparisons, self.comparison_notes)
            files["comparisons.csv"] = comparisons_csv(self.comparisons)
        if self.paper.rows:
            files["paper.csv"] = _paper_csv(self.paper)
        # A lone surrogate out of a broken name cannot be UTF-8.
        return {name: text.encode(errors="backslashreplace") for name, text in files.items()}

    def _markdown(self) -> str:
        parts = [
            f"### {table.title}\n\n{to_markdown(table, marks=table.marks())}"
            for table in self.tables
        ]
        parts.append("".join(f"- {line}\n" for line in self._legend()))
        if self.paper.rows:
            parts += ["### Beside the paper's Table 1\n", to_markdown(self.paper)]
            things = enumerate(self.paper.differences, start=1)
            parts.append("".join(f"{number}. {thing}\n" for number, thing in things))
            parts.append("".join(f"- {line}\n" for line in paper_notes(self.paper)))
        return "\n".join(parts)

    def _legend(self) -> list[str]:
        units = sorted({row.unit for row in self.tables[0].rows})
        given = [row.label for row in self.tables[0].rows if not row.competes]
        lines = [
            f"Mean ± sample standard deviation over n {' or '.join(units)}; in brackets after a "
            "set's name the number of its prompts.",
            "Bold: the best of a column; underlined: the second best; equal as printed shares it.",
        ]
        once = [table.title for table in self.tables if metric_of(table.metric).once_per_set]
        lines += [f"Not ranked, as given: {', '.join(given)}."] if given else []
        lines += [f"Measured once per set, n counts trainings: {', '.join(once)}."] if once else []
        note = average_note(self.tables[0])
        return lines + ([f"{note[0].upper()}{note[1:]}."] if note else [])

    def _latex(self) -> str:
        """Returns a tabular per metric, each under a comment with its title (package booktabs)."""
        legend = "".join(f"% {line}\n" for line in self._legend())
        parts = [
            f"% {table.title}\n{to_latex(table, marks=table.marks())}" for table in self.tables
        ]
        if self.paper.rows:
            notes = "".join(f"% {line}\n" for line in paper_notes(self.paper))
            parts.append(f"% Beside {CITATION}\n{notes}{to_latex(self.paper)}")
            if self.paper.differences:
                items = "".join(f"\\item {escape_latex(s)}\n" for s in self.paper.differences)
                parts.append(f"\\begin{{enumerate}}\n{items}\\end{{enumerate}}\n")
        return "\n".join([legend, *parts])


def build_scoreboard(
    methods: Sequence[Method], *, further: Sequence[str] = (), baseline: str | None = None
) -> Scoreboard:
    """Builds all tables of scores, and compares all methods with the baseline.

    Args:
        methods: Rows, in this order; none is fine.
        further: Metrics beside `metrics.ALWAYS`.
        baseline: Label of the method to compare with; default: see `choose_baseline`.

    Raises:
        ConfigError: A metric or a baseline that is not there.
        DataError: A broken samples.jsonl.
    """
    metrics = chosen_metrics(methods, further)
    chosen = choose_baseline(methods, baseline)
    sets = sort_sets(name for method in methods for name in method.test_sets)
    averaged = shared_sets(methods, sets)
    comparisons: list[MetricComparison] = []
    notes: list[str] = []
    if chosen is not None:
        comparisons, notes = compare_methods(
            methods, sets=sets, metrics=metrics, baseline=chosen, averaged=averaged
        )
        if any(any(content.comparisons.values()) for content in comparisons):
            reason = "--baseline" if baseline is not None else "--baseline LABEL chooses another"
            notes.insert(0, f"comparisons.md: all differences are to {chosen.label} ({reason})")
    tables = [
        build_table(methods, metric=name, sets=sets, averaged=averaged)
        for name in metrics
        if methods
    ]
    notes += [note for table in tables[:1] if (note := average_note(table))]
    return Scoreboard(
        methods=methods,
        tables=tables,
        comparisons=comparisons,
        comparison_notes=notes,
        paper=build_paper_table(methods),
    )


def average_note(table: ScoreTable) -> str:
    """Returns over which sets the average is, empty where it is over all."""
    if not table.not_averaged:
        return ""
    return (
        f"the average is over {', '.join(table.averaged)}, which all compared methods were scored "
        f"on; without {', '.join(table.not_averaged)}"
    )


def _paper_csv(table: PaperTable) -> str:
    """Returns the paper's table in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = ["method", "paper_row", "paper_average", "mean", "sd", "n", "differences", "source"]
    writer.writerow(columns)
    for row in table.rows:
        ours = row.ours
        figures = ["", "", 0] if ours is None else [ours.mean, ours.sd, ours.n]
        told = "; ".join(row.differences)
        writer.writerow(
            [row.method.label, row.paper_name, row.paper_average, *figures, told, CITATION]
        )
    return buffer.getvalue()
