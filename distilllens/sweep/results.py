"""What the folders of a sweep say: finished trainings, the chosen learning rates, the scores."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from distilllens.report.runs.record import RunRecord, read_runs
from distilllens.report.scores.load import Score, list_some
from distilllens.runs import RunFolder, is_finished
from distilllens.sweep.cells import cell_path, evaluate_config
from distilllens.sweep.scores import read_scores
from distilllens.sweep.spec import Sweep

Place = tuple[str, int]
"""Method and training seed."""
Found = tuple[list[Score], str]
"""Scores, one for each set and sampling seed, and a remark; one of the two is empty."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A finished training."""

    seed: int
    lr: float | None
    """Of the grid; None without one."""
    record: RunRecord

    @property
    def best_metric(self) -> float | None:
        """Of best/ on the dev set, in the unit of eval.metric; None without a dev set."""
        value = self.record.status.get("best_metric")
        return None if value is None else float(value)

    @property
    def dev_loss(self) -> float | None:
        """Of best/, in nats per response token; None without a dev set."""
        steps, losses = self.record.series("eval/dev/loss")
        return dict(zip(steps, losses, strict=True)).get(self.record.status.get("best_step", 0))

    @property
    def minutes(self) -> float:
        """Spent in steps and dev evaluations, without starts and what an interruption lost."""
        _, evaluations = self.record.series("perf/eval_s")
        return (sum(seconds for seconds, _ in self._windows()) + sum(evaluations)) / 60

    @property
    def tokens_per_s(self) -> float | None:
        """Response tokens trained on per second of steps; None where no step was logged."""
        windows = self._windows()
        total = sum(seconds for seconds, _ in windows)
        return sum(tokens for _, tokens in windows) / total if total else None

    def _windows(self) -> list[tuple[float, float]]:
        """Returns seconds and response tokens of the steps up to each logged line."""
        found, before = [], 0
        for line in self.record.lines:
            if "perf/step_s" in line:
                seconds = float(line["perf/step_s"]) * (int(line["step"]) - before)
                found.append((seconds, float(line["perf/response_tokens_per_s"]) * seconds))
                before = int(line["step"])
        return found


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What is known of a method."""

    name: str
    runs: tuple[TrainedRun, ...]
    """Finished trainings with the chosen learning rate, in the order of the seeds."""
    scores: Mapping[str, Mapping[int, float]]
    """Rouge-L × 100 by set and training seed: each the mean over its sampling seeds."""
    evaluated: tuple[Score, ...]
    """The results.json files that these come from."""
    notes: tuple[str, ...]
    """What is missing, and what was chosen."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The trainings that stand for a method."""

    runs: tuple[TrainedRun, ...]
    """Finished, with the chosen learning rate, in the order of the seeds."""
    notes: tuple[str, ...] = ()
    """Remarks on the choice."""


def read_results(sweep: Sweep, choices: Mapping[str, Choice]) -> list[MethodResult]:
    """Reads what the sweep's folders say of all methods.

    Raises:
        ConfigError, DataError: A folder holds what evaluate.py does not write, or the evaluation's
            layers are not valid.
    """
    found = {
        (method, run.seed): read_scores(evaluate_config(sweep, method, run.lr, run.seed))
        for method in sweep.methods
        for run in (choices[method].runs if sweep.evaluation is not None else ())
    }
    found = _on_same_records(found, baseline=sweep.baseline)
    return [
        _read_method(
            sweep,
            method,
            choices[method],
            {seed: scores for (owner, seed), scores in found.items() if owner == method},
        )
        for method in sweep.methods
    ]


def _on_same_records(found: Mapping[Place, Found], *, baseline: str) -> dict[Place, Found]:
    """Leaves out the scores on other records than the baseline's, or than the first that are."""
    records: dict[str, str | None] = {}
    for place in sorted(found, key=lambda place: place[0] != baseline):
        for score in found[place][0]:
            records.setdefault(score.test_set, score.records)
    checked = {}
    for place, (scores, note) in found.items():
        others = [score for score in scores if score.records != records[score.test_set]]
        if others:
            sets = list_some(dict.fromkeys(score.test_set for score in others))
            folder = others[0].file.parents[2]
            note = f"scored on other records of {sets} than the others; remove {folder}"
        checked[place] = ([] if others else scores), note
    return checked


def _read_method(
    sweep: Sweep, method: str, choice: Choice, found: Mapping[int, Found]
) -> MethodResult:
    runs, notes = choice.runs, list(choice.notes)
    evaluated: list[Score] = []
    scores: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed, (counted, note) in found.items():
        notes += [f"{method} seed {seed}: {note}"] if note else []
        evaluated += counted
        for score in counted:
            scores[score.test_set][seed].append(score.metrics["rougeL"])
    missing = [str(seed) for seed in sweep.seeds if seed not in {run.seed for run in runs}]
    if missing:
        notes.append(f"{method}: seeds without a finished training: {', '.join(missing)}")
    means = {
        name: {seed: statistics.fmean(drawn) for seed, drawn in by_seed.items()}
        for name, by_seed in scores.items()
    }
    return MethodResult(
        name=method, runs=runs, scores=means, evaluated=tuple(evaluated), notes=tuple(notes)
    )


def choose_runs(sweep: Sweep) -> dict[str, Choice]:
    """Returns each method's finished trainings, of a grid those with its best learning rate.

    Of several learning rates only those with all seeds finished can be chosen, by the mean of the
    best dev metrics over the seeds: the test sets have no say.

    Raises:
        ConfigError, DataError: A folder holds what train.py does not write.
    """
    return {method: _choose(sweep, method) for method in sweep.methods}


def _choose(sweep: Sweep, method: str) -> Choice:
    if len(sweep.lr) < 2:  # nothing to choose
        rate = sweep.lr[0] if sweep.lr else None
        return Choice(runs=tuple(_finished_runs(sweep, method, rate)))
    by_lr = {lr: _finished_runs(sweep, method, lr) for lr in sweep.lr}
    metrics = {
        lr: [run.best_metric for run in runs if run.best_metric is not None]
        for lr, runs in by_lr.items()
    }
    complete = {
        lr: statistics.fmean(values)
        for lr, values in metrics.items()
        if len(values) == len(sweep.seeds)
    }
    open_rates = ", ".join(f"{lr:g}" for lr in by_lr if lr not in complete)
    notes = [f"{method}: not finished with all seeds: lr {open_rates}"] if open_rates else []
    if not complete:
        return Choice(runs=(), notes=tuple(notes))
    metric = by_lr[next(iter(complete))][0].record.config.eval.metric
    best = (max if metric == "rougeL" else min)(complete, key=lambda lr: complete[lr])
    if len(complete) > 1:
        notes.insert(0, f"{method}: lr {best:g}, the best of {len(complete)} on the dev set")
    return Choice(runs=tuple(by_lr[best]), notes=tuple(notes))


def _finished_runs(sweep: Sweep, method: str, lr: float | None) -> list[TrainedRun]:
    folders = {seed: sweep.output_dir / cell_path(method, lr, seed) for seed in sweep.seeds}
    finished = {seed: path for seed, path in folders.items() if is_finished(RunFolder(path))}
    records = read_runs(list(finished.values()))
    return [
        TrainedRun(seed=seed, lr=lr, record=record)
        for seed, record in zip(finished, records, strict=True)
    ]
