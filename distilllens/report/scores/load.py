"""Reads the scores that ``evaluate.py`` left: one `Score` for each results.json below a folder.

The layout is METHOD/seedN/SET/results.json, or METHOD/seedT/seedN/SET/results.json where a method
was trained with several seeds: T is then the training seed and N the sampling seed.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilllens.data.benchmarks import BENCHMARKS
from distilllens.errors import ConfigError, DataError
from distilllens.parsing import did_you_mean
from distilllens.report.scores.metrics import ALWAYS, metric_of

SEED_FOLDER = re.compile(r"seed(\d+)")
BESIDE = {"judge", "harness"}
"""Folders beside the seeds, whose results.json are no scores of sets."""
EVALUATIONS = "eval_main"
"""Folder of results/ with the evaluations of the runs in results/train."""
GIVEN_FOLDERS = ("given", "teacher")
"""Folders above the method's whose models are shown but do not compete: checkpoints as they were
given (run_eval.sh), and a teacher that was trained here (quickstart.sh)."""


WEIGHTS = "weights and tokenizer"
"""Of `Score.origin`: fingerprint of what was scored."""
MOST_NAMES = 6
"""Things that a note names."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One results.json: one model, one test set, one sampling seed."""

    file: Path
    method_folder: Path
    """Folder above the seeds; scores of one method share it."""
    name: str
    test_set: str
    training_seed: int | None
    """From the path; None where the path has one level of seeds only."""
    sampling_seed: int
    num_prompts: int
    metrics: Mapping[str, float]
    """Every number of results.json's metrics: `ALWAYS`, and what else was measured."""
    checkpoint: str
    """The folder that was scored; empty where the result does not say."""
    records: str | None
    """Fingerprint of the records, where the result has one."""
    settings: Mapping[str, Any]
    """How the answers were generated; methods are comparable where this is equal."""
    origin: Mapping[str, str]
    """What else made the figures, as far as the result tells: `WEIGHTS`, and what
    `comparison.warnings.MADE_BY` lists."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """All scores of one method, under the label that tables and plots show."""

    label: str
    scores: tuple[Score, ...]
    is_teacher: bool = False
    """Whether it was the teacher of another that is shown."""

    @property
    def test_sets(self) -> list[str]:
        """The sets it was scored on, each once, sorted."""
        return sorted({score.test_set for score in self.scores})

    @property
    def is_given(self) -> bool:
        """Whether it is a given model, such as the teacher, beside those that are compared."""
        return self.is_teacher or any(
            score.method_folder.parent.name in GIVEN_FOLDERS for score in self.scores
        )

    @property
    def by_training(self) -> bool:
        """Whether it has several training seeds, which are then its units."""
        return len({score.training_seed for score in self.scores}) > 1

    def by_unit(self, metric: str) -> dict[str, dict[int, float]]:
        """Returns the metric by set and unit (see `table`), where it was measured.

        A unit is a training seed with the mean over its sampling seeds, or a sampling seed; of
        what is measured once per set always a training.
        """
        by_training = self.by_training or metric_of(metric).once_per_set
        draws: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for score in self.scores:
            # Beside several training seeds, a training without one stands under −1.
            seed = score.training_seed if score.training_seed is not None else -1
            unit = seed if by_training else score.sampling_seed
            if metric in score.metrics:
                draws[score.test_set][unit].append(score.metrics[metric])
        return {
            name: {unit: statistics.fmean(drawn) for unit, drawn in sorted(units.items())}
            for name, units in draws.items()
        }


def collect_scores(folders: Iterable[Path]) -> list[Score]:
    """Reads every results.json below the folders, each file once, in the order of the folders.

    Args:
        folders: Evaluation folders at any height: results/eval_main, one method, one seed.

    Returns:
        Scores; those of one folder in natural order of their paths (seed10 before seed100).

    Raises:
        ConfigError: A folder does not exist.
        DataError: A results.json is not what evaluate.py writes.
    """
    scores: dict[Path, Score] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"--eval {folder}: no such folder",
                fix="give a folder that evaluate.py wrote, for example results/eval_main",
            )
        files = (
            path.resolve()
            for path in folder.rglob("results.json")
            if SEED_FOLDER.fullmatch(path.parent.parent.name)
            or not BESIDE & set(path.relative_to(folder).parts)
        )
        for file in sorted(files, key=_natural_key):
            scores.setdefault(file, _read_score(file))
    return list(scores.values())


def evaluation_folder(run: Path) -> Path | None:
    """Returns where a run's evaluation lies by the scripts' layout; None for a run elsewhere.

    That is SWEEP/eval/X for a run in SWEEP/X, a sweep's folder, and results/eval_main/X for one in
    results/train/X.
    """
    for folder in run.parents:
        if (folder / "sweep.json").is_file():
            return folder / "eval" / run.relative_to(folder)
    for folder in run.parents:  # the deepest first: a checkout may lie in such a folder itself
        if folder.parts[-2:] == ("results", "train"):
            return folder.parent / EVALUATIONS / run.relative_to(folder)
    return None


def group_methods(scores: Sequence[Score], *, teachers: Collection[Path] = ()) -> list[Method]:
    """Groups scores by method folder, in order of first appearance, with unique labels.

    Args:
        scores: Of all methods.
        teachers: Absolute folders with the scores of teachers that were trained here.
    """
    by_folder: dict[Path, list[Score]] = {}
    for score in scores:
        by_folder.setdefault(score.method_folder, []).append(score)
    names = {folder: _common_name(members) for folder, members in by_folder.items()}
    labels = unique_labels(names)
    return [
        Method(
            label=labels[folder],
            scores=tuple(members),
            is_teacher=any(
                score.file.is_relative_to(teacher) for score in members for teacher in teachers
            ),
        )
        for folder, members in by_folder.items()
    ]


def list_some(items: Iterable[str], *, separator: str = ", ") -> str:
    """Returns items as a list, the first few of many."""
    listed = list(items)
    rest = len(listed) - MOST_NAMES
    return separator.join(listed[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def unique_labels(names: Mapping[Path, str]) -> dict[Path, str]:
    """Returns one label per folder: its name, with the differing part of the path where needed.

    Two folders called ``rkl`` become ``rkl (kd/rkl)`` and ``rkl (distill_lens/rkl)``.
    """
    labels = {}
    for folder, name in names.items():
        twins = [str(other) for other, twin_name in names.items() if twin_name == name]
        if len(twins) > 1:
            # commonpath of the twins' parents would hide a twin that is the parent of another.
            tail = os.path.relpath(folder, os.path.commonpath(twins))
            name = f"{name} ({folder.name if tail == '.' else tail})"
        labels[folder] = name
    return labels


def shared_sets(methods: Sequence[Method], sets: Sequence[str]) -> tuple[str, ...]:
    """Returns the sets to average over: those that all competing methods were scored on.

    All sets, where fewer than two are shared: then only methods with every set have an average.
    """
    rivals = [method for method in methods if not method.is_given]
    shared = tuple(name for name in sets if all(name in rival.test_sets for rival in rivals))
    return shared if len(shared) > 1 else tuple(sets)


def sort_sets(names: Iterable[str]) -> list[str]:
    """Returns each name once: the paper's sets first, in its order, then the others by name."""
    present = set(names)
    known = [name for name in BENCHMARKS if name in present]
    return known + sorted(present.difference(known))


def chosen_metrics(methods: Sequence[Method], further: Sequence[str]) -> list[str]:
    """Returns the metrics to show: `ALWAYS`, then the further ones that were asked for.

    Raises:
        ConfigError: A metric that no results.json has, with what there is.
    """
    known = {name for method in methods for score in method.scores for name in score.metrics}
    known.discard("num")
    for name in further:
        if name not in known:
            raise ConfigError(
                f"--metrics {name}: no results.json has it{did_you_mean(name, known)}",
                fix=f"any of: {', '.join(sorted(known)) or 'none, as there are no scores'}",
            )
    return list(dict.fromkeys([*ALWAYS, *further]))


def known_choices(
    methods: Sequence[Method], further: Sequence[str], baseline: str | None
) -> tuple[list[str], str | None, list[str]]:
    """Returns the metrics and the baseline that are there already, and a note of the others."""
    known = {name for method in methods for score in method.scores for name in score.metrics}
    notes = [f"--metrics {name}: no scores have it yet" for name in further if name not in known]
    if baseline is not None and baseline not in {method.label for method in methods}:
        notes.append(f"--baseline {baseline}: not scored yet")
        baseline = None
    return [name for name in further if name in known], baseline, notes


def choose_baseline(methods: Sequence[Method], label: str | None) -> Method | None:
    """Returns the method that others are compared with; None without a method that competes.

    Args:
        methods: All methods, in the order of the tables.
        label: Of the wanted one; default: the first that was only fine-tuned (sft), else the first.

    Raises:
        ConfigError: No method has the label.
    """
    if label is not None:
        found = [method for method in methods if method.label == label]
        if not found:
            labels = [method.label for method in methods]
            raise ConfigError(
                f"--baseline {label}: no such method{did_you_mean(label, set(labels))}",
                fix=f"one of: {', '.join(labels) or 'none, as there are no scores'}",
            )
        return found[0]
    students = [method for method in methods if not method.is_given]
    tuned = [method for method in students if _is_fine_tuned(method)]
    return next(iter(tuned or students), None)


def _is_fine_tuned(method: Method) -> bool:
    folder = method.scores[0].method_folder
    return "sft" in (folder.name, folder.parent.name)


def prompt_counts(methods: Sequence[Method]) -> dict[str, int]:
    """Returns the number of prompts of each set (the smallest, where methods differ)."""
    counts: dict[str, int] = {}
    for score in (score for method in methods for score in method.scores):
        known = counts.get(score.test_set, score.num_prompts)
        counts[score.test_set] = min(known, score.num_prompts)
    return counts


def _read_score(file: Path) -> Score:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: not JSON: {error}", fix="evaluate again with --overwrite"
        ) from None
    try:
        metrics = _numbers(content["metrics"])
        num_prompts = int(content["metrics"]["num"])
        test_set, seed = str(content["set"]), int(content["seed"])
        name, settings = str(content["name"]), _generation_settings(content["config"])
        records = content.get("identity", {}).get("records")
        origin = _origin(file, content, metrics)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: not a result of evaluate.py: {type(error).__name__} {error}",
            why="a report needs metrics.{rougeL, exact_match, num}, set, seed, name and config",
            fix="evaluate again with --overwrite, or remove the file",
        ) from None
    method_folder, training_seed = _method_of(file)
    if training_seed is not None:
        name = re.sub(rf"[/ _-]seed{training_seed}$", "", name)
    return Score(
        file=file,
        method_folder=method_folder,
        name=name,
        test_set=test_set,
        training_seed=training_seed,
        sampling_seed=seed,
        num_prompts=num_prompts,
        metrics=metrics,
        checkpoint=str(content.get("checkpoint", "")),
        records=records,
        settings=settings,
        origin=origin,
    )


def _origin(file: Path, content: Mapping[str, Any], metrics: Collection[str]) -> dict[str, str]:
    """Returns `Score.origin`; of measures that the result does not have it tells nothing."""
    identity = content.get("identity", {})
    known = {
        WEIGHTS: identity.get(WEIGHTS),
        "backend": identity.get("backend"),
        "dtype": content.get("dtype"),
    }
    if "similarity" in metrics:
        known["similarity"] = content.get("similarity", {}).get("model")
    # OUTPUT_DIR/token_metrics/SET.json, which is newer than the cell's own configuration.
    measured = file.parents[2] / "token_metrics" / f"{file.parent.name}.json"
    if "teacher_entropy" in metrics and measured.is_file():
        measure = json.loads(measured.read_text(encoding="utf-8"))
        known["teacher"] = measure.get("identity", {}).get("teacher")
    return {key: str(value) for key, value in known.items() if value is not None}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns what is a number: evaluate.py may have written metrics of other forms beside."""
    numbers = {name: float(metrics[name]) for name in ALWAYS}
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers.setdefault(name, float(value))
    return numbers


def _generation_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides the answers, without the seeds and what only decides the speed."""
    settings = dict(config["eval"]) | {"max_prompt_length": config["max_prompt_length"]}
    # What long prompts become shows in the records.
    for key in (
        "seeds",
        "batch_size",
        "batch_tokens",
        "every",
        "dev_size",
        "metric",
        "long_prompts",
    ):
        settings.pop(key, None)
    return settings


def _method_of(file: Path) -> tuple[Path, int | None]:
    """Returns the folder above the seed folders, and the training seed if the path has one."""
    for folder in file.parents:
        if SEED_FOLDER.fullmatch(folder.name):
            above = SEED_FOLDER.fullmatch(folder.parent.name)
            if above:
                return folder.parent.parent, int(above.group(1))
            return folder.parent, None
    return file.parent.parent, None


def _common_name(scores: Sequence[Score]) -> str:
    names = {score.name for score in scores}
    if len(names) == 1:
        return names.pop()
    return "/".join(scores[0].method_folder.parts[-2:])


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sorts numbers inside paths by value, so that seed9 stands before seed10."""
    pieces = re.split(r"(\d+)", str(path))
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in pieces]
