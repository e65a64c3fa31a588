"""The one table of a sweep: scores, paired differences, dev metrics and cost, and its files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from distilllens.errors import StorageError
from distilllens.report.comparison.methods import MetricComparison, compare_methods
from distilllens.report.comparison.tables import comparisons_csv, comparisons_markdown
from distilllens.report.plots import score_panel
from distilllens.report.scores.load import Method, sort_sets
from distilllens.report.scores.metrics import ALWAYS
from distilllens.report.scores.table import Row, ScoreTable, Summary, to_csv
from distilllens.report.style import LIGHT, figure_png
from distilllens.report.tables import MISSING, Marks, to_latex, to_markdown
from distilllens.statistics import LEVEL
from distilllens.sweep.paired import PairedDifference, paired_difference
from distilllens.sweep.results import MethodResult, TrainedRun
from distilllens.sweep.spec import Sweep
from distilllens.sweep.stored import unequal_budgets

UNIT = "training seeds"
DEV_TITLES = {"rougeL": "dev Rouge-L", "loss": "dev loss"}


@dataclass(frozen=True)
class SweepTable:
    """A row per method; written by the report's writers."""

    text_columns: ClassVar[tuple[int, ...]] = (0,)
    sweep: Sweep
    results: Sequence[MethodResult]

    # --- Figures ---

    @cached_property
    def scores(self) -> ScoreTable:
        """Rouge-L on the test sets; of a sweep without evaluation, the best dev metric."""
        by_method: dict[str, Mapping[str, Mapping[int, float]]]
        if self.sweep.evaluation is None:
            metric = self.dev_metric
            by_method = {r.name: {"dev": _by_seed(r, "best_metric")} for r in self.results}
        else:
            metric = "rougeL"
            by_method = {result.name: result.scores for result in self.results}
        present = {name for scores in by_method.values() for name in scores}
        sets = sort_sets(present)
        rows = [
            Row(
                label=name,
                cells={test_set: _summary(scores.get(test_set, {})) for test_set in sets},
                average=_summary(_averages(scores, sets)),
                unit=UNIT,
            )
            for name, scores in by_method.items()
        ]
        return ScoreTable(metric=metric, sets=tuple(sets), rows=tuple(rows))

    @cached_property
    def dev_metric(self) -> str:
        """What chose best/: loss or rougeL; of the first training that is finished."""
        runs = [run for result in self.results for run in result.runs]
        return runs[0].record.config.eval.metric if runs else "loss"

    @property
    def larger_is_better(self) -> bool:
        """Of the compared figure."""
        return self.scores.metric == "rougeL"

    @cached_property
    def compared(self) -> dict[str, dict[int, float]]:
        """The figure that methods are compared by, by method and seed: the average over sets."""
        if self.sweep.evaluation is None:
            return {result.name: _by_seed(result, "best_metric") for result in self.results}
        return {result.name: _averages(result.scores, self.scores.sets) for result in self.results}

    @cached_property
    def differences(self) -> dict[str, PairedDifference | None]:
        """Each method minus the baseline, but for the baseline itself."""
        baseline = self.compared[self.sweep.baseline]
        return {
            name: paired_difference(values, baseline)
            for name, values in self.compared.items()
            if name != self.sweep.baseline
        }

    @cached_property
    def comparisons(self) -> tuple[list[MetricComparison], list[str]]:
        """Each method against the baseline prompt by prompt, and what could not be compared.

        Empty without an evaluation of the baseline.
        """
        methods = [Method(label=r.name, scores=r.evaluated) for r in self.results if r.evaluated]
        baselines = [method for method in methods if method.label == self.sweep.baseline]
        if not baselines:
            return [], []
        return compare_methods(
            methods, sets=self.scores.sets, metrics=ALWAYS, baseline=baselines[0]
        )

    @cached_property
    def unequal(self) -> dict[str, dict[str, tuple[Any, ...]]]:
        """What differs in the budgets of the finished trainings: option or fact → method → values.

        One value for each method, several where its own trainings differ.
        """
        records = {
            (result.name, run.seed): run.record for result in self.results for run in result.runs
        }
        found = unequal_budgets(records)
        if self.sweep.lr:
            found.pop("optim.lr", None)
        return {key: _by_method(values) for key, values in found.items()}

    def is_unequal(self, method: str) -> bool:
        """Whether a method's budget is not the baseline's, or not one."""
        return any(self._is_apart(method, values) for values in self.unequal.values())

    def _is_apart(self, method: str, values: Mapping[str, tuple[Any, ...]]) -> bool:
        """Nobody is apart from a baseline that has no value yet, or none of this kind."""
        own, common = values.get(method, ()), values.get(self.sweep.baseline)
        return len(own) > 1 or (bool(own) and common is not None and own != common)

    # --- Texts ---

    def header(self) -> list[str]:
        """Returns the column titles."""
        scores = self.scores.header()[2:]
        difference = [f"Δ {self.sweep.baseline}", "se", f"{LEVEL:.0%} interval", "verdict"]
        dev = list(dict.fromkeys([DEV_TITLES[self.dev_metric], "dev loss"]))
        lr = ["lr"] if self.sweep.lr else []
        return ["method", "n", *scores, *difference, *dev, *lr, "minutes", "tokens/s"]

    def lines(self) -> list[list[str]]:
        """Returns the formatted cells, a list per row, as long as the header."""
        return [
            self._line(result, scores)
            for result, scores in zip(self.results, self.scores.lines(), strict=True)
        ]

    def _line(self, result: MethodResult, scores: Sequence[str]) -> list[str]:
        dev = {self.dev_metric: "best_metric", "loss": "dev_loss"}
        rate = result.runs[0].lr if result.runs else None
        minutes, tokens = _figures(result, "minutes"), _figures(result, "tokens_per_s")
        return [
            result.name + (" †" if self.is_unequal(result.name) else ""),
            *scores[1:],
            *self._difference(result.name),
            *(_text(_summary(_by_seed(result, name))) for name in dict.fromkeys(dev.values())),
            *([MISSING if rate is None else f"{rate:g}"] if self.sweep.lr else []),
            f"{statistics.fmean(minutes):.1f}" if minutes else MISSING,
            f"{statistics.fmean(tokens):,.0f}" if tokens else MISSING,
        ]

    def _difference(self, method: str) -> list[str]:
        difference = self.differences.get(method)
        if difference is None:
            return [MISSING] * 4
        spread = "" if difference.sd is None else f" ± {difference.sd:.2f}"
        fewer = "" if difference.n == len(self.compared[method]) else f" (n={difference.n})"
        return [
            f"{difference.mean:+.2f}{spread}{fewer}",
            MISSING if difference.standard_error is None else f"{difference.standard_error:.2f}",
            MISSING
            if difference.interval is None
            else "{:+.2f} to {:+.2f}".format(*difference.interval),
            self.verdict(method),
        ]

    def verdict(self, method: str) -> str:
        """Returns what the interval says of a method against the baseline."""
        difference = self.differences.get(method)
        if difference is None:
            return MISSING
        if difference.is_noise is None:
            return "one seed"
        if difference.is_noise:
            return "under the noise"
        return "better" if (difference.mean > 0) == self.larger_is_better else "worse"

    def marks(self) -> Marks:
        """Returns the best and second best mean of each column of scores."""
        return self.scores.marks()

    def notes(self) -> list[str]:
        """Returns what a reader must know to read the table."""
        lines = [
            f"{self.scores.title}: mean ± sample standard deviation over n training seeds"
            + (
                "." if self.sweep.evaluation is None else ", each the mean over its sampling seeds."
            ),
            f"Δ {self.sweep.baseline}: the mean difference to it, ± the standard deviation of the "
            f"differences of equal seeds (same data, same order), its standard error and Student's "
            f"t interval. Under the noise: the interval contains 0. Of 20 such intervals about one "
            f"misses by chance.",
            "Minutes and tokens/s (response tokens per second of steps) are means over seeds on "
            "the machine that trained; trainings side by side slow each other down.",
            *(
                ["The same differences prompt by prompt: comparisons.md."]
                if self.comparisons[0]
                else []
            ),
            *self._budget(),
        ]
        return lines + [note for result in self.results for note in result.notes]

    def _budget(self) -> list[str]:
        """Returns the common budget, and who had another one."""
        runs = [run for result in self.results for run in result.runs]
        if not runs:
            return []
        steps = " or ".join(str(n) for n in sorted({run.record.num_steps for run in runs}))
        lines = [
            f"{steps} optimizer steps on {_join(run.record.config.data.path for run in runs)}."
        ]
        lines += [self._unequal_line(key, values) for key, values in self.unequal.items()]
        if not self.unequal:
            chosen = ", but for the chosen learning rates" if len(self.sweep.lr) > 1 else ""
            lines[0] += f" All options of data, optim and eval are equal{chosen}."
        return lines

    def _unequal_line(self, key: str, values: Mapping[str, tuple[Any, ...]]) -> str:
        told = {method: " or ".join(map(str, own)) for method, own in values.items()}
        common = told.pop(self.sweep.baseline, None)
        others = ", ".join(f"{method} {own}" for method, own in told.items() if own != common)
        mark = "† " if any(self._is_apart(method, values) for method in values) else ""
        if common is None:
            return f"{mark}not an equal budget: {key} {others}."
        return f"{mark}not an equal budget: {key} {common}{f', but {others}' if others else ''}."

    # --- Files ---

    def markdown(self) -> str:
        """Returns the table and its notes."""
        notes = "".join(f"- {note}\n" for note in self.notes())
        table = to_markdown(self, marks=self.marks())
        return f"# Sweep {self.sweep.name}\n\n{table}\n{notes}"

    def csv(self) -> str:
        """Returns all figures in full precision, a line per metric, method and set."""
        columns = {
            f"{self.scores.metric} minus {self.sweep.baseline}": {
                name: Summary(values=difference.values)
                for name, difference in self.differences.items()
                if difference is not None
            }
        }
        for name in ("best_metric", "dev_loss", "minutes", "tokens_per_s"):
            columns[name] = {
                result.name: summary
                for result in self.results
                if (summary := _summary(_by_seed(result, name))) is not None
            }
        return to_csv([self.scores, *(self._one_column(*column) for column in columns.items())])

    def _one_column(self, metric: str, by_method: Mapping[str, Summary]) -> ScoreTable:
        rows = [
            Row(label=name, cells={"all": by_method.get(name)}, average=None, unit=UNIT)
            for name in self.sweep.methods
        ]
        return ScoreTable(metric=metric, sets=("all",), rows=tuple(rows))

    def json(self) -> str:
        """Returns every figure by method and seed."""
        content = {
            "sweep": self.sweep.name,
            "metric": self.scores.metric,
            "baseline": self.sweep.baseline,
            "unequal": {
                key: {m: own[0] if len(own) == 1 else list(own) for m, own in values.items()}
                for key, values in self.unequal.items()
            },
            "notes": self.notes(),
            "methods": {result.name: self._record(result) for result in self.results},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def _record(self, result: MethodResult) -> dict[str, Any]:
        difference = self.differences.get(result.name)
        values = self.compared[result.name]
        summary = _summary(values)
        return {
            "lr": result.runs[0].record.config.optim.lr if result.runs else None,
            "mean": None if summary is None else summary.mean,
            "sd": None if summary is None else summary.sd,
            "n": len(values),
            "by_seed": values,
            "scores": {name: dict(by_seed) for name, by_seed in result.scores.items()},
            "difference": None
            if difference is None
            else {
                "values": difference.values,
                "mean": difference.mean,
                "sd": difference.sd,
                "standard_error": difference.standard_error,
                "interval": difference.interval,
                "verdict": self.verdict(result.name),
            },
            "runs": {run.seed: _run_figures(run) for run in result.runs},
        }

    def write(self, out: Path) -> list[Path]:
        """Writes sweep.md, sweep.csv, sweep.tex, sweep.json, and sweep.png where there are scores.

        Where there are samples, it writes comparisons.md and comparisons.csv, too.

        Raises:
            DataError: A broken samples.jsonl.
            StorageError: The folder cannot be written.
        """
        files = {
            "sweep.md": self.markdown().encode(),
            "sweep.csv": self.csv().encode(),
            "sweep.tex": to_latex(self, marks=self.marks()).encode(),
            "sweep.json": self.json().encode(),
        }
        comparisons, missing = self.comparisons
        if comparisons:
            files["comparisons.md"] = comparisons_markdown(comparisons, missing).encode()
            files["comparisons.csv"] = comparisons_csv(comparisons).encode()
        panel = score_panel(self.scores) if self.scores.sets else None
        if panel is not None:
            files["sweep.png"] = figure_png(panel.draw(LIGHT))
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                draft = out / f".{name}.tmp"
                draft.write_bytes(content)
                draft.replace(out / name)
        except OSError as error:
            raise StorageError(
                f"cannot write the table into {out}", why=str(error), fix="--output_dir DIR"
            ) from None
        return [out / name for name in files]


def _run_figures(run: TrainedRun) -> dict[str, float | None]:
    return {
        "best_metric": run.best_metric,
        "dev_loss": run.dev_loss,
        "minutes": run.minutes,
        "tokens_per_s": run.tokens_per_s,
    }


def _by_method(values: Mapping[tuple[str, int], Any]) -> dict[str, tuple[Any, ...]]:
    """Returns each method's values, each once, in the order of its trainings."""
    distinct: dict[str, dict[str, Any]] = {}
    for (method, _), value in values.items():
        distinct.setdefault(method, {})[repr(value)] = value
    return {method: tuple(own.values()) for method, own in distinct.items()}


def _by_seed(result: MethodResult, figure: str) -> dict[int, float]:
    """Returns one figure of `_run_figures` by training seed, where it is known."""
    found = {run.seed: _run_figures(run)[figure] for run in result.runs}
    return {seed: value for seed, value in found.items() if value is not None}


def _figures(result: MethodResult, figure: str) -> list[float]:
    return list(_by_seed(result, figure).values())


def _averages(scores: Mapping[str, Mapping[int, float]], sets: Sequence[str]) -> dict[int, float]:
    """Returns the mean over sets by seed, for the seeds that have every set."""
    by_set = [scores.get(name, {}) for name in sets]
    if not by_set:
        return {}
    return {
        seed: statistics.fmean(values[seed] for values in by_set)
        for seed in by_set[0]
        if all(seed in values for values in by_set)
    }


def _summary(by_seed: Mapping[int, float]) -> Summary | None:
    return Summary(values=tuple(by_seed.values())) if by_seed else None


def _text(summary: Summary | None) -> str:
    return MISSING if summary is None else summary.format()


def _join(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
