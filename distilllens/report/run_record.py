"""Reads a training run's folder: configuration, metrics.jsonl, environment, data, layer pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilllens.config import CE_ONLY, TrainConfig, load_config
from distilllens.errors import ConfigError, DataError
from distilllens.layers import LayerPair
from distilllens.report.scores import unique_labels

MetricsLine = Mapping[str, Any]


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

    def best_dev(self) -> tuple[int, float] | None:
        """Returns the step and value of the smallest dev loss; None without dev evaluation."""
        steps, losses = self.series("eval/dev/loss")
        finite = [(loss, step) for step, loss in zip(steps, losses, strict=True) if loss == loss]
        if not finite:
            return None
        loss, step = min(finite)
        return step, loss


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Reads run folders; labels are the methods' names, made unique.

    Raises:
        ConfigError: A folder is missing or no training run's, or its config.yaml is not valid.
        DataError: A file of the run is malformed (with line number for metrics.jsonl).
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    configs = {folder: _read_config(folder) for folder in folders}
    names = {folder: method_name(config) for folder, config in configs.items()}
    labels = unique_labels(names)
    return [_read_run(folder, configs[folder], labels[folder]) for folder in folders]


def method_name(config: TrainConfig) -> str:
    """Returns run.name, or what evaluations call a run without a name: sft, kd/fkl and so on."""
    approach = config.objective.approach
    if config.run.name:
        return config.run.name
    return approach if approach in CE_ONLY else f"{approach}/{config.objective.divergence}"


def read_metrics(path: Path) -> list[MetricsLine]:
    """Reads metrics.jsonl.

    A last line without newline that is no JSON is what a killed run leaves; it is left out. Of
    several lines of one step with the same metric (a run that was resumed) the last one counts.

    Returns:
        One mapping for each step and kind of line, in order of steps.

    Raises:
        DataError: Another line is not a JSON object with a whole "step", or a metric is no number.
    """
    if not path.is_file():
        return []
    raw_lines = path.read_bytes().split(b"\n")
    lines: dict[tuple[int, bool], MetricsLine] = {}
    for number, raw in enumerate(raw_lines, start=1):
        if not raw.strip():
            continue
        try:
            line = _parse_metrics_line(raw)
        except ValueError as error:
            # split leaves the text after the last newline as the last piece.
            if number == len(raw_lines):
                continue
            raise DataError(
                f"{path}:{number}: {error}",
                why="each line of metrics.jsonl is one JSON object with numbers, and a step",
                fix="remove the line",
            ) from None
        is_dev = any(key.startswith("eval/") for key in line)
        lines[int(line["step"]), is_dev] = line
    return [lines[key] for key in sorted(lines)]


def _parse_metrics_line(raw: bytes) -> MetricsLine:
    """Returns a line as a mapping; ValueError says what is wrong with it."""
    try:
        line = json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from None
    if not isinstance(line, dict):
        raise ValueError(f"expected a JSON object, got {type(line).__name__}")
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"step={step!r} is not a whole number")
    for key, value in line.items():
        plotted = key.startswith(("train/", "eval/", "perf/"))
        if plotted and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            raise ValueError(f"{key}={value!r} is not a number")
    return {key: value for key, value in line.items() if value is not None}


def _read_config(folder: Path) -> TrainConfig:
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such run folder",
            fix="give the run.output_dir of a training run, for example results/train/…",
        )
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a training run's folder: it has no config.yaml",
            fix="give the run.output_dir of a training run; evaluation folders go to --eval",
        )
    return load_config(["--config", str(path)])


def _read_run(folder: Path, config: TrainConfig, label: str) -> RunRecord:
    return RunRecord(
        folder=folder,
        label=label,
        config=config,
        lines=tuple(read_metrics(folder / "metrics.jsonl")),
        environment=_read_object(folder / "environment.json"),
        data=_read_object(folder / "data.json"),
        status=_read_object(folder / "status.json"),
        pairs=_read_pairs(folder / "layers.json"),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}", fix="remove the file") from None


def _read_object(path: Path) -> Mapping[str, Any]:
    """Returns a JSON object's content, empty where an early or unfinished run has no such file."""
    if not path.is_file():
        return {}
    content = _read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_pairs(path: Path) -> tuple[LayerPair, ...]:
    if not path.is_file():
        return ()
    content = _read_json(path)
    if not isinstance(content, list) or not all(_is_pair(entry) for entry in content):
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
