"""The comparisons as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distilllens.report.comparison.methods import AVERAGE, Comparison, MetricComparison
from distilllens.report.scores.metrics import metric_of
from distilllens.report.tables import MISSING, to_markdown
from distilllens.statistics import LEVEL, RESAMPLES, SEED

EXPLANATIONS = (
    "A prompt's value is its mean over all seeds of the method; then the prompts are drawn again, "
    f"with repetition, {RESAMPLES:,} times (random numbers of seed {SEED}: the same files give the "
    "same figures). Of the average each set is drawn on its own, and every set counts the same.",
    f"{LEVEL:.0%} intervals over prompts: would other prompts of this kind say the same of these "
    "very models and answers? Of a mean BCa, of a difference the percentiles of paired draws.",
    f"{LEVEL:.0%} intervals over seeds: would other answers (sampling seeds), or other trainings "
    "(training seeds, where there are several), say the same? Student's t over the differences "
    "seed by seed. The two are different things: many prompts do not make up for one training.",
    "p: two-sided, twice the smaller share of draws on either side of 0. p (Holm): corrected for "
    "the number of methods in the same table; not for the number of tables.",
    "Under the noise: the interval over prompts contains 0; or p (Holm) is not below "
    f"{1 - LEVEL:.2f}; or the interval over seeds contains 0. Such a difference shows nothing.",
)


@dataclass(frozen=True, kw_only=True)
class MeansTable:
    """The mean of every method on every set, with its interval over prompts."""

    text_columns: ClassVar[tuple[int, ...]] = (0,)
    content: MetricComparison

    def header(self) -> list[str]:
        """Returns the column titles, with the number of prompts where all methods share it."""
        return [
            "method",
            "answers per prompt",
            *(self._title(column) for column in self.content.columns),
        ]

    def _title(self, column: str) -> str:
        means = self.content.means.values()
        counts = {by_column[column].num_prompts for by_column in means if column in by_column}
        return f"{column} ({counts.pop():,})" if len(counts) == 1 else column

    def lines(self) -> list[list[str]]:
        """Returns the formatted cells, a list per row, as long as the header."""
        lines = []
        for label, by_column in self.content.means.items():
            seeds = sorted({sampled.num_seeds for sampled in by_column.values()})
            cells = []
            for column in self.content.columns:
                sampled = by_column.get(column)
                if sampled is None:
                    cells.append(MISSING)
                    continue
                low, high = sampled.resampled.interval()
                cells.append(f"{sampled.resampled.mean:.2f} ({low:.2f} to {high:.2f})")
            lines.append([label, "–".join(map(str, seeds)) or "0", *cells])
        return lines


@dataclass(frozen=True, kw_only=True)
class DifferencesTable:
    """Every method minus the baseline, in one column of scores."""

    text_columns: ClassVar[tuple[int, ...]] = (0, 9)
    content: MetricComparison
    column: str

    def title(self) -> str:
        """Returns what the table compares."""
        title = metric_of(self.content.metric).title
        return f"{title}, {self.column}: difference to {self.content.baseline}"

    def header(self) -> list[str]:
        """Returns the column titles."""
        interval = f"{LEVEL:.0%} over"
        return [
            "method",
            "prompts",
            "answers per prompt",
            f"Δ {self.content.baseline}",
            f"{interval} prompts",
            "draws ≤ 0",
            "p",
            "p (Holm)",
            f"{interval} seeds",
            "verdict",
        ]

    def lines(self) -> list[list[str]]:
        """Returns the formatted cells, a list per row, as long as the header."""
        return [self._line(row) for row in self.content.comparisons[self.column]]

    def _line(self, row: Comparison) -> list[str]:
        own, other = row.num_seeds
        bootstrap, seeds = row.bootstrap, row.seed_interval
        return [
            row.method,
            f"{row.num_prompts:,}",
            str(own) if own == other else f"{own} and {other}",
            f"{bootstrap.mean:+.2f}",
            _interval(bootstrap.interval),
            f"{bootstrap.share_not_above:.2%}",
            f"{bootstrap.p:.4f}",
            f"{row.p_holm:.4f}",
            MISSING if seeds is None else f"{_interval(seeds)} (n={len(row.seed_differences)})",
            row.verdict(self.content.metric),
        ]


def difference_tables(content: MetricComparison) -> list[DifferencesTable]:
    """Returns a table for each column that has comparisons; the average comes first."""
    return [
        DifferencesTable(content=content, column=column)
        for column in sorted(content.columns, key=lambda column: column != AVERAGE)
        if content.comparisons[column]
    ]


def _interval(interval: tuple[float, float]) -> str:
    return "{:+.2f} to {:+.2f}".format(*interval)


def comparisons_markdown(comparisons: Sequence[MetricComparison], notes: Sequence[str]) -> str:
    """Returns all comparisons as one Markdown file; the average comes before the single sets."""
    parts = ["# Comparisons\n"]
    for content in comparisons:
        title = metric_of(content.metric).title
        parts.append(f"## {title}\n\nMean ({LEVEL:.0%} interval over prompts):\n")
        parts.append(to_markdown(MeansTable(content=content)))
        for table in difference_tables(content):
            parts.append(f"### {table.title()}\n")
            parts.append(to_markdown(table))
        warning = content.warning()
        parts += [f"{warning}.\n"] if warning else []
    parts.append("## How to read this\n")
    lines = [*EXPLANATIONS, *notes]
    parts.append("".join(f"- {line}\n" for line in lines))
    return "\n".join(parts)


COLUMNS = (
    *(
        "metric",
        "set",
        "method",
        "baseline",
        "prompts",
        "answers_per_prompt",
        "value",
        "low",
        "high",
    ),
    *("share_not_above_0", "p", "p_holm", "seeds_low", "seeds_high", "seeds_n", "verdict"),
)


def comparisons_csv(comparisons: Sequence[MetricComparison]) -> str:
    """Returns all means and differences as one CSV, in full precision.

    A line without a baseline is a mean with its interval over prompts; one with a baseline is the
    difference to it. ``answers_per_prompt`` of the method: one for each of its seeds; ``seeds_n``
    are the seeds that it shares with the baseline.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for content in comparisons:
        for label, by_column in content.means.items():
            for column, sampled in by_column.items():
                low, high = sampled.resampled.interval()
                writer.writerow(
                    {"metric": content.metric, "set": column, "method": label}
                    | {"prompts": sampled.num_prompts, "answers_per_prompt": sampled.num_seeds}
                    | {"value": sampled.resampled.mean, "low": low, "high": high}
                )
        for column, rows in content.comparisons.items():
            for row in rows:
                writer.writerow(
                    {"metric": content.metric, "set": column, "baseline": content.baseline}
                    | _csv_figures(row)
                    | {"verdict": row.verdict(content.metric)}
                )
    return buffer.getvalue()


def _csv_figures(row: Comparison) -> dict[str, str | int | float]:
    bootstrap = row.bootstrap
    low, high = row.seed_interval or ("", "")
    return {
        "method": row.method,
        "prompts": row.num_prompts,
        "answers_per_prompt": row.num_seeds[0],
        "value": bootstrap.mean,
        "low": bootstrap.interval[0],
        "high": bootstrap.interval[1],
        "share_not_above_0": bootstrap.share_not_above,
        "p": bootstrap.p,
        "p_holm": row.p_holm,
        "seeds_low": low,
        "seeds_high": high,
        "seeds_n": len(row.seed_differences),
    }
