"""What trainings of a sweep left: are they those of its file, and had they an equal budget?

Options do not tell all of it. The number of processes makes up the global batch, and the records
may have been made anew between two trainings: a run's environment.json and data.json know that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilllens.config import TrainConfig
from distilllens.data.generated import RECORDS
from distilllens.data.records import file_sha256
from distilllens.errors import ConfigError
from distilllens.report.runs.record import RunRecord, read_config, read_run
from distilllens.runs import is_finished, newest_state
from distilllens.sweep.cells import STEPS, Cell, Who, unequal_options
from distilllens.sweep.spec import Sweep
from distilllens.training.resume import course_of

GLOBAL_BATCH = "global batch"
SHARES = ("optim.micro_batch_size", "optim.accumulation")
"""Options that may differ where the global batch is the same."""
CONTENT = "content of the records"
ORIGIN = (
    *("data.path", "data.generated", "data.keep_gold", "data.bad_lines", "eval.dev_size"),
    *("data.max_length", "data.max_prompt_length", "model.student"),
)
"""Options that decide which records are read, and how: where they are equal, so is the content."""


def unequal_budgets(records: Mapping[Who, RunRecord]) -> dict[str, dict[Who, Any]]:
    """Returns in what the budgets of trainings differ: option or fact → training → value.

    A training stands under `CONTENT` only if another of the same options read other records.
    """
    options = unequal_options({who: record.config for who, record in records.items()})
    differing = {key: values for key, values in options.items() if key not in SHARES}
    if STEPS in differing:  # what was done tells more than what was configured
        differing[STEPS] = {who: records[who].num_steps for who in differing[STEPS]}
    differing[GLOBAL_BATCH] = {
        who: global_batch(record.config, world_size(record)) for who, record in records.items()
    }
    differing[CONTENT] = _other_content(records)
    return {
        key: values for key, values in differing.items() if len(set(map(repr, values.values()))) > 1
    }


def world_size(record: RunRecord) -> int | None:
    """Returns how many processes a run had, None where its environment.json is gone."""
    size = record.environment.get("machine", {}).get("world_size")
    return None if size is None else int(size)


def global_batch(config: TrainConfig, processes: int | None) -> int | None:
    """Returns how many records all processes train on in a step."""
    own = config.optim.micro_batch_size * config.optim.accumulation
    return None if processes is None else own * processes


def _other_content(records: Mapping[Who, RunRecord]) -> dict[Who, str]:
    """Returns what trainings read, of those whose options another had that read something else."""
    by_origin: dict[str, dict[Who, str]] = defaultdict(dict)
    for who, record in records.items():
        options = course_of(record.config)
        origin = repr([options.get(key) for key in ORIGIN])
        by_origin[origin][who] = str(record.data.get("fingerprint", "unknown"))[:8]
    differing: dict[Who, str] = {}
    for read in by_origin.values():
        differing |= read if len(set(read.values())) > 1 else {}
    return differing


# --- Before anything starts ---------------------------------------------------------------------


def check_stored(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Refuses to go on where trainings stand that are not those of this sweep.

    A cell that has saved nothing yet is no loss: train.py starts it anew.

    Raises:
        ConfigError: Lists each of them, with what differs.
        DataError: A file of a run is malformed.
    """
    problems: dict[Path, str] = {}
    stored: dict[Path, RunRecord] = {}
    is_complete = True
    for cell in cells:
        is_complete = is_complete and is_finished(cell.folder)
        if not is_finished(cell.folder) and newest_state(cell.folder) is None:
            continue
        root = cell.folder.root
        try:
            stored[root] = read_run(root, read_config(root), ())
        except ConfigError as error:
            problems[root] = error.what
            continue
        if told := _differences(sweep, cell, stored[root]):
            problems[root] = ", ".join(told)
    others, hashes = _other_content(stored), dict[Path, str]()
    for root, record in stored.items():
        if root in others:
            problems.setdefault(root, f"{CONTENT} {others[root]}, not the same everywhere")
        elif not is_complete and (changed := _changed_records(record, hashes)):
            problems.setdefault(root, f"{CONTENT}: {', '.join(changed)} changed since")
    if problems:
        told_all = "; ".join(f"{root}: {told}" for root, told in problems.items())
        raise ConfigError(
            f"{len(problems)} of {len(cells)} cells hold another training: {told_all}",
            fix="give the options, the records or the number of processes of before (or an "
            "optim.accumulation for the same global batch); or --output_dir DIR for another "
            "folder; or remove these and train them again",
            kept="everything in them is untouched; nothing was started",
        )


def _differences(sweep: Sweep, cell: Cell, record: RunRecord) -> list[str]:
    stored, wanted = course_of(record.config), course_of(cell.config)
    processes = world_size(record)
    if is_finished(cell.folder) or processes != sweep.processes:  # else train.py goes on from it
        for key in SHARES:
            stored[key] = wanted[key]
    stored[GLOBAL_BATCH] = global_batch(record.config, processes)
    wanted[GLOBAL_BATCH] = global_batch(cell.config, sweep.processes)
    return [
        f"{key} {stored.get(key)} → {wanted.get(key)}"
        for key in dict.fromkeys([*wanted, *stored])
        if wanted.get(key) != stored.get(key)
    ]


def _changed_records(record: RunRecord, hashes: dict[Path, str]) -> list[str]:
    """Returns the files that a run read and that are not what they were, as far as data.json tells.

    A file that is gone is for train.py to tell of: it may not be needed any more.

    Args:
        record: Of the run.
        hashes: Of the files of now; what is missing is added.
    """
    source, data = record.data.get("source", {}), record.config.data
    changed = []
    for key, folder in (("raw_sha256", data.path), ("generated_sha256", data.generated)):
        if key not in source or folder is None:
            continue
        file = Path(folder) / RECORDS
        if file not in hashes and file.is_file():
            hashes[file] = file_sha256(file)
        if file in hashes and hashes[file] != source[key]:
            changed.append(str(file))
    return changed
