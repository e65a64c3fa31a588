"""Tasks of lm-eval (the Language Model Evaluation Harness) on a checkpoint of ours.

`python -m distilllens evaluate --harness arc_easy,hellaswag …` runs them instead of the sets. Each
task is finished when OUTPUT_DIR/harness/TASK/results.json stands there, and then skipped.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from distilllens.config import EvaluateConfig
from distilllens.errors import ConfigError, DataError
from distilllens.evaluation.plan import check_settings
from distilllens.evaluation.protocol import DTYPES, local_device
from distilllens.evaluation.provenance import checkpoint_fingerprint, method_name
from distilllens.evaluation.results import check_writable, is_finished, read_result, write_cell
from distilllens.models import load_model, load_tokenizer
from distilllens.runs import git_commit, versions

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234}
FEWSHOT_SEED = 1234
"""lm-eval's own defaults, so that figures compare with those that others report."""
PLAIN_NAME = re.compile(r"[\w.+-]+")
RESULT_KEYS = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""What is kept of lm-eval's results."""


def run_harness(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Runs the tasks that are not finished, and prints a table of all.

    Args:
        config: Checkpoint, tasks, limits, output folder.

    Returns:
        The content of each task's results.json; nothing in a dry run.

    Raises:
        ConfigError: lm-eval is not installed, several processes, an unknown task, a broken model
            folder, or results of another evaluation in the output folder.
        DataError: A task's records cannot be loaded.
        StorageError: The output folder cannot be written.
    """
    names = task_names(config)
    check_settings(config)
    if isinstance(config.limit, int) and config.limit < 1:
        raise ConfigError(f"limit={config.limit} must be ≥ 1", fix="leave --limit out for all")
    _check_installed()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--harness runs in one process",
            fix="start it without torchrun; other tasks may run beside it on other GPUs",
        )
    console = Console(highlight=False, markup=False)
    tasks = load_task_index(config.harness_path, names)
    folders = {name: Path(config.output_dir) / "harness" / name for name in names}
    wanted = {name: identity(config, name) for name in names}
    missing = [
        name for name in names if config.overwrite or not is_finished(folders[name], wanted[name])
    ]
    console.print(f"{len(names)} tasks, {len(names) - len(missing)} finished already, skipped")
    if config.dry_run:
        return []
    check_writable(Path(config.output_dir))
    model = _load(config) if missing else None
    for name in missing:
        assert model is not None
        start = time.monotonic()
        found, samples = evaluate_task(config, model, tasks, name)
        seconds = time.monotonic() - start
        write_cell(folders[name], _result(config, name, wanted[name], found, seconds), samples)
    results = [read_result(folders[name] / "results.json") for name in names]
    console.print(build_table(results, title=f"{method_name(config)} ({config.checkpoint})"))
    console.print(f"results: {Path(config.output_dir) / 'harness'}", soft_wrap=True)
    return results


def task_names(config: EvaluateConfig) -> list[str]:
    """Returns the tasks' names, which may be given as a list or with commas.

    Raises:
        ConfigError: There are none, one occurs twice, or one is no plain name.
    """
    given = config.harness or []
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    bad = [name for name in names if not PLAIN_NAME.fullmatch(name) or name.startswith(".")]
    if bad or not names or len(set(names)) != len(names):
        raise ConfigError(
            f"harness={given!r:.100} must name tasks of lm-eval, each once",
            fix="--harness arc_easy,hellaswag",
        )
    return names


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--harness needs lm-eval, which is not installed", fix="bash scripts/setup.sh harness"
        )


def load_task_index(own_folder: str | None, names: Sequence[str]) -> TaskManager:
    """Returns lm-eval's index of tasks.

    Its own some 15,000 names take seconds to read, and are left out where the tasks of the own
    folder are enough.

    Raises:
        ConfigError: A task is unknown, or the folder is not there.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if own_folder is not None:
        if not Path(own_folder).is_dir():
            raise ConfigError(f"harness_path={own_folder}: no such folder")
        tasks = TaskManager(include_path=own_folder, include_defaults=False)
        if set(names) <= set(tasks.all_subtasks):
            return tasks
    tasks = TaskManager(include_path=own_folder)
    for name in names:
        if name not in tasks.task_index:
            near = difflib.get_close_matches(name, tasks.all_tasks, n=3)
            raise ConfigError(
                f"lm-eval has no task {name!r:.80}"
                + (f" (did you mean {' or '.join(near)}?)" if near else ""),
                fix="python -m lm_eval ls tasks lists them; --harness_path adds own ones",
            )
    return tasks


def identity(config: EvaluateConfig, name: str) -> dict[str, Any]:
    """Returns what a task's figures depend on; the batch size is none of it."""
    own = Path(config.harness_path) if config.harness_path is not None else None
    return {
        "weights and tokenizer": checkpoint_fingerprint(config.checkpoint, config.revision),
        "task": name,
        "own tasks": None if own is None else _folder_hash(own),
        "dtype": config.dtype,
        "attention": config.attention,
        "limit": config.limit,
        "harness_fewshot": config.harness_fewshot,
        "lm_eval": metadata.version("lm_eval"),
    }


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(folder)}:{file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _load(config: EvaluateConfig) -> HFLM:
    """Loads the checkpoint by our rules (safetensors, pinned code) and hands it to lm-eval."""
    from lm_eval.models.huggingface import HFLM

    trust, revision = config.trust_remote_code, config.revision
    tokenizer = load_tokenizer(config.checkpoint, trust_remote_code=trust, revision=revision)
    model = load_model(
        config.checkpoint,
        dtype=DTYPES[config.dtype],
        attention=config.attention,
        trust_remote_code=trust,
        revision=revision,
    )
    module: torch.nn.Module = model
    module.to(local_device())
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=config.eval.batch_size,
    )


def evaluate_task(
    config: EvaluateConfig, model: HFLM, tasks: TaskManager, name: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs one task, group or tag.

    Returns:
        lm-eval's results, and for each sample its task, index, hash, filter and metrics.

    Raises:
        ConfigError: It runs code that a model wrote.
        DataError: Its records or its files cannot be loaded.
    """
    import lm_eval  # type: ignore[import-untyped]

    try:
        loaded = tasks.load([name])
    except Exception as error:  # whatever a library stumbles over in a task's files and downloads
        raise DataError(
            f"the task {name} cannot be loaded",
            why=f"{type(error).__name__}: {error}".partition("\n")[0][:300],
            fix="its records come from the hub, unless a cache or --harness_path has them",
            kept="finished tasks are skipped next time",
        ) from None
    if unsafe := [name for name, task in loaded["tasks"].items() if task.get_config("unsafe_code")]:
        raise ConfigError(
            f"the task {unsafe[0]} runs code that the model writes",
            fix="choose other tasks; lm-eval's own command runs it where that is safe",
        )
    group = loaded["groups"].get(name)
    found: Any = lm_eval.simple_evaluate(
        model=model,
        tasks=list(loaded["tasks"].values()) if group is None else [group],
        task_manager=tasks,
        num_fewshot=config.harness_fewshot,
        batch_size=config.eval.batch_size,
        limit=None if config.limit == "all" else config.limit,
        fewshot_random_seed=FEWSHOT_SEED,
        **SEEDS,
    )
    samples = [
        {
            "task": task,
            "index": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "filter": sample["filter"],
            **{metric: _plain(sample[metric]) for metric in sample["metrics"]},
        }
        for task, drawn in found["samples"].items()
        for sample in drawn
    ]
    return {key: _plain(found[key]) for key in RESULT_KEYS if key in found}, samples


def _plain(value: Any) -> Any:
    """Returns a result as JSON has it: no NaN, which a standard error of one sample is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)  # NumPy's numbers too
    return number if math.isfinite(number) else None


def _result(
    config: EvaluateConfig,
    name: str,
    wanted: Mapping[str, Any],
    found: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Returns the content of results.json."""
    return {
        "metrics": found.get("groups", {}).get(name) or found["results"].get(name, {}),
        "task": name,
        "name": method_name(config),
        "checkpoint": config.checkpoint,
        "identity": dict(wanted),
        "harness": dict(found),
        "seeds": {**SEEDS, "fewshot_random_seed": FEWSHOT_SEED},
        "timing": {"seconds": round(seconds, 3)},
        "config": dataclasses.asdict(config),
        "versions": {**versions(), "lm_eval": metadata.version("lm_eval")},
        "git_commit": git_commit(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def build_table(results: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """Returns every metric of every task, with lm-eval's standard error and the number of samples.

    A group's subtasks follow it.
    """
    table = Table(title=title)
    for column in ("task", "version", "shots", "n", "metric", "value"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for result in results:
        found = result["harness"]
        for name, metrics in {**found.get("groups", {}), **found["results"]}.items():
            count = found["n-samples"].get(name, {}).get("effective", "–")
            shots, version = found["n-shot"].get(name, "–"), found["versions"].get(name, "–")
            for metric, value, error in _metrics(metrics):
                spread = "" if error is None else f" ± {error:.4f}"
                cells = (name, version, shots, count, metric, f"{value:.4f}{spread}")
                table.add_row(*map(str, cells))
    return table


def _metrics(metrics: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Returns name, value and standard error of each; lm-eval names them ``acc,FILTER``."""
    rows = []
    for key, value in metrics.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{name}_stderr,{chosen}")
        shown = name if chosen == "none" else f"{name} ({chosen})"
        rows.append((shown, float(value), error if isinstance(error, float) else None))
    return rows
