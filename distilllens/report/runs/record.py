"""Reads a training run's folder: configuration, metrics.jsonl, environment, data, layer pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilllens.config import CE_ONLY, TrainConfig, load_config
from distilllens.errors import ConfigError, DataError
from distilllens.layers import LayerPair
from distilllens.report.runs.metrics_file import MetricsLine, read_metrics
from distilllens.report.scores.load import SEED_FOLDER, list_some, unique_labels
from distilllens.runs import read_json

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one training run left behind."""

    folder: Path
    label: str
    """Unique among the runs of one report."""
    config: TrainConfig
    lines: tuple[MetricsLine, ...]
    """metrics.jsonl in order of steps; empty where nothing is logged yet."""
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    status: Mapping[str, Any]
    pairs: tuple[LayerPair, ...]
    """Layers the run paired; empty without a lens term."""

    @property
    def num_steps(self) -> int:
        """The last step of metrics.jsonl, 0 where it is empty."""
        return max((int(line["step"]) for line in self.lines), default=0)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns the steps and values of one metric, without the lines that lack it."""
        points = [(int(line["step"]), float(line[key])) for line in self.lines if key in line]
        return [step for step, _ in points], [value for _, value in points]

    def keys(self, prefix: str) -> list[str]:
        """Returns the metrics whose names begin with a prefix, sorted."""
        return sorted({key for line in self.lines for key in line if key.startswith(prefix)})

    def last(self, key: str) -> tuple[int, float] | None:
        """Returns the last step of a metric and its value there; None if it was never logged."""
        steps, values = self.series(key)
        return (steps[-1], values[-1]) if steps else None

    def best_dev(
        self, key: str = "eval/dev/loss", *, largest: bool = False
    ) -> tuple[int, float] | None:
        """Returns the first step of the best dev value, and that; None without dev evaluation."""
        steps, values = self.series(key)
        sign = -1 if largest else 1
        finite = [(sign * v, step) for step, v in zip(steps, values, strict=True) if v == v]
        if not finite:
            return None
        value, step = min(finite)
        return step, sign * value


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Reads run folders; labels are the methods' names, made unique.

    Raises:
        ConfigError: A folder is missing or no training run's, or its config.yaml is not valid.
        DataError: A file of the run is malformed (with line number for metrics.jsonl).
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    runs = [
        read_run(folder, read_config(folder), read_metrics(folder / METRICS)) for folder in folders
    ]
    return with_labels(runs)


def find_runs(paths: Sequence[Path], *, is_live: bool) -> tuple[list[Path], list[str]]:
    """Returns the run folders among what a shell's pattern gave, and a note of what is left out.

    A folder without config.yaml stands for the runs in its seedN folders, if it has such.

    Args:
        paths: Of runs, and of what lies beside them: log files, reports.
        is_live: Folders that are not there yet, or have no config.yaml yet, are runs to come.

    Raises:
        ConfigError: A path does not exist, or none is a run.
    """
    found: list[Path] = []
    left_out: list[Path] = []
    for path in (path.resolve() for path in paths):
        if (path / CONFIG).is_file():
            found.append(path)
        elif seeds := _seed_runs(path):
            found += seeds
        elif path.is_file() or (path / "report.html").is_file():
            left_out.append(path)
        elif is_live:
            found.append(path)
        elif path.is_dir():
            left_out.append(path)
        else:
            read_config(path)  # says what is wrong
    if not found:
        read_config(left_out[0])
    names = list_some(str(path) for path in dict.fromkeys(left_out))
    notes = [f"left out, as no {CONFIG} is in it: {names}"] if left_out else []
    return list(dict.fromkeys(found)), notes


def _seed_runs(folder: Path) -> list[Path]:
    """Returns the runs in the folders seedN of a folder, by their numbers."""
    seeds = {
        int(match[1]): file.parent
        for file in folder.glob(f"seed*/{CONFIG}")
        if (match := SEED_FOLDER.fullmatch(file.parent.name))
    }
    return [seeds[seed] for seed in sorted(seeds)]


def with_labels(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the runs with labels that tell them apart."""
    labels = unique_labels({run.folder: method_name(run.config) for run in runs})
    return [dataclasses.replace(run, label=labels[run.folder]) for run in runs]


def method_name(config: TrainConfig) -> str:
    """Returns run.name, or what evaluations call a run without a name: sft, kd/fkl and so on."""
    approach = config.objective.approach
    if config.run.name:
        return config.run.name
    return approach if approach in CE_ONLY else f"{approach}/{config.objective.divergence}"


def read_config(folder: Path) -> TrainConfig:
    """Reads the configuration a run was started with.

    Raises:
        ConfigError: The folder is missing or no training run's, or its config.yaml is not valid.
    """
    if not folder.exists():
        raise ConfigError(
            f"{folder}: no such run folder",
            fix="give the run.output_dir of a training run, for example results/train/…",
        )
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a training run's folder: it has no {CONFIG}",
            fix="give the run.output_dir of a training run; evaluation folders go to --eval",
        )
    return load_config(["--config", str(path)])


def read_run(folder: Path, config: TrainConfig, lines: Sequence[MetricsLine]) -> RunRecord:
    """Reads what else lies in a run's folder; the label is the method's name.

    Raises:
        DataError: One of its JSON files is malformed.
    """
    return RunRecord(
        folder=folder,
        label=method_name(config),
        config=config,
        lines=tuple(lines),
        environment=read_json(folder / "environment.json", {}),
        data=read_json(folder / "data.json", {}),
        status=read_json(folder / "status.json", {}),
        pairs=_read_pairs(folder / "layers.json"),
    )


def _read_pairs(path: Path) -> tuple[LayerPair, ...]:
    content = read_json(path, [])
    if not all(_is_pair(entry) for entry in content):
        raise DataError(f'{path}: expected a list of {{"teacher": i, "student": j}}')
    return tuple(LayerPair(teacher=pair["teacher"], student=pair["student"]) for pair in content)


def _is_pair(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(side), int) for side in ("teacher", "student")
    )


def report_folder(folders: Iterable[Path]) -> Path:
    """Returns where a report of these runs goes: report/ in the deepest folder above them all.

    results/report, where they have nothing in common.
    """
    parents = [folder.resolve().parent for folder in folders]
    shared = parents[0]
    for parent in parents[1:]:
        while not parent.is_relative_to(shared):
            shared = shared.parent
    return Path("results/report") if shared == shared.parent else shared / "report"
