"""The scores of a sweep's trainings: which of them are of this sweep's evaluation.

Scores stand side by side only where what made the answers is the same: the settings of the sweep
file's ``evaluate``, all its sets and sampling seeds, and the weights that are there now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilllens.config import EvaluateConfig
from distilllens.data.benchmarks import max_records
from distilllens.errors import ConfigError
from distilllens.evaluation.cells.provenance import (
    answer_settings,
    checkpoint_fingerprint,
    differences,
)
from distilllens.evaluation.cells.results import read_result
from distilllens.report.scores.load import WEIGHTS, Score, collect_scores, list_some
from distilllens.runs import is_finished
from distilllens.sweep.cells import Cell, evaluate_config
from distilllens.sweep.spec import Sweep

AGAIN = "--overwrite_scores scores again"
LONG_PROMPTS = "eval.long_prompts"
"""In an identity only where a prompt was over the limit."""


def read_scores(config: EvaluateConfig) -> tuple[list[Score], str]:
    """Returns the scores of an evaluation, one for each set and sampling seed; and a remark.

    Nothing is returned of an evaluation that is not complete, of other settings or of other
    weights: a mean over fewer sampling seeds or of another model would pass for the same.
    """
    folder, best = Path(config.output_dir), Path(config.checkpoint)
    wanted = [file.resolve() for file in _files(config)]
    stored = collect_scores([folder]) if folder.is_dir() else []
    found = [score for score in stored if score.file in wanted]
    if not found:
        return [], "not scored"
    results = [read_result(score.file) for score in found]
    told = dict.fromkeys(text for result in results for text in _other_settings(config, result))
    if told:
        return [], f"scored with other settings ({list_some(told, separator='; ')}); {AGAIN}"
    if len(found) < len(wanted):
        return [], f"scored in part only ({len(found)} of {len(wanted)})"
    if best.is_dir() and {_weights(result) for result in results} != {
        checkpoint_fingerprint(str(best))
    }:
        return [], f"{folder} holds scores of other weights than {best}; {AGAIN}"
    return found, ""


def is_scored(config: EvaluateConfig) -> bool:
    """Whether what evaluate.py would do is all done: these settings, the weights of now."""
    files = _files(config)
    if not all(file.is_file() for file in files):
        return False
    weights = checkpoint_fingerprint(config.checkpoint)
    results = {file: read_result(file) for file in files}
    return all(
        not _other_settings(config, result)
        and _weights(result) == weights
        and _is_measured(config, file, result)
        for file, result in results.items()
    )


def check_scores(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Refuses to start where evaluate.py would refuse in the end: scores of another evaluation.

    Raises:
        ConfigError: Lists the folders, with what differs.
    """
    problems = []
    for cell in cells:
        config = evaluate_config(sweep, cell.method, cell.lr, cell.seed)
        results = [read_result(file) for file in _files(config) if file.is_file()]
        told = dict.fromkeys(text for result in results for text in _other_settings(config, result))
        if results and is_finished(cell.folder) and cell.folder.best.is_dir():
            now = checkpoint_fingerprint(config.checkpoint)
            if any(_weights(result) != now for result in results):
                told[f"other weights than {config.checkpoint}"] = None
        if told:
            problems.append(f"{cell.evaluation}: {'; '.join(told)}")
    if problems:
        raise ConfigError(
            f"{len(problems)} of {len(cells)} cells hold scores of another evaluation: "
            f"{list_some(problems, separator='; ')}",
            fix=f"the settings of before; or {AGAIN} what differs; or --output_dir DIR",
            kept="nothing was started",
        )


def _files(config: EvaluateConfig) -> list[Path]:
    """Returns the results.json of all sets and sampling seeds."""
    return [
        Path(config.output_dir) / f"seed{seed}" / name / "results.json"
        for name in config.sets
        for seed in config.eval.seeds
    ]


def _weights(result: Mapping[str, Any]) -> Any:
    return result["identity"].get(WEIGHTS)


def _other_settings(config: EvaluateConfig, result: Mapping[str, Any]) -> list[str]:
    """Returns in what a stored result is not of these settings: as evaluate.py compares them.

    Speed, paths and what else changes no answer have no say. The records themselves are not read:
    a limit counts where it gives another number of them.
    """
    stored, wanted = dict(result["identity"]), answer_settings(config)
    for key in (WEIGHTS, "records"):
        stored.pop(key, None)
    if LONG_PROMPTS in stored:
        wanted[LONG_PROMPTS] = config.eval.long_prompts
    told = differences(stored, wanted)
    before = max_records(result["set"], result["config"]["limit"])
    now = max_records(result["set"], config.limit)
    if before != now:
        num = int(result["counts"]["records"])
        is_whole = before is None or num < before  # the set has no more
        if not is_whole or (now is not None and now < num):
            told.append(f"limit: {before or 'all'} there, {now or 'all'} now")
    return told


def _is_measured(config: EvaluateConfig, file: Path, result: Mapping[str, Any]) -> bool:
    """Whether a result has the measures that are asked for, against this teacher."""
    if config.similarity not in (None, result.get("similarity", {}).get("path")):
        return False
    teacher = {}
    if config.teacher is not None:
        lora = config.teacher_lora
        teacher = {
            "teacher": checkpoint_fingerprint(config.teacher, config.teacher_revision),
            "teacher_lora": None if lora is None else checkpoint_fingerprint(lora),
        }
    asked = {}
    if config.token_metrics:
        name = f"{file.parent.name}.json"
        asked["token_metrics"] = Path(config.output_dir) / "token_metrics" / name
    if config.exposure_bias:
        asked["exposure_bias"] = file.with_name("exposure_bias.json")
    return all(
        measure in result.get("measures", {}) and _is_against(teacher, place)
        for measure, place in asked.items()
    )


def _is_against(teacher: Mapping[str, Any], file: Path) -> bool:
    """Whether a measure's file is of this teacher; evaluate.py makes a broken one anew."""
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError):
        return False
    return teacher == {k: identity[k] for k in ("teacher", "teacher_lora") if k in identity}
