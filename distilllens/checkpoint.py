"""Training states on disk: committed whole, verified, rotated, and found again.

A state ``RUN/state/step-N`` holds DeepSpeed's files, every process's random state, the student as a
Hugging Face folder, and ``state.json``; `manifest` says when it counts as one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distilllens import distributed
from distilllens.config import TrainConfig
from distilllens.errors import CheckpointError, DistributedError, UserError
from distilllens.export import (
    STUDENT_FOLDER,
    copy_model,
    export_model,
    gather_weights,
    storage_error,
    write_model,
)
from distilllens.faults import reach
from distilllens.manifest import (
    DRAFT,
    FileRecord,
    HashedFile,
    clean_leftovers,
    delete_state,
    find_damage,
    hash_folder,
    newest_good_state,
    read_manifest,
    saved_states,
    step_folders,
    sync,
    write_hashed,
    write_manifest,
)
from distilllens.runs import RunFolder, git_commit, versions

__all__ = [
    "TrainState",
    "check_same_config",
    "copy_model",
    "export_model",
    "find_state",
    "load_state",
    "save_state",
    "saved_states",
    "storage_error",
]

STATE_FILE = "state.json"
DEEPSPEED_FOLDER = "deepspeed"
DEEPSPEED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""All that DeepSpeed's files may hold beside tensors and plain values."""

NOT_COURSE = (
    *("run", "tracking", "dry_run", "debug"),
    *("model.teacher_cache", "model.teacher_placement"),
)
"""Options that a resumed run may change."""

Result = TypeVar("Result")
logger = logging.getLogger("distilllens")


@dataclass
class TrainState:
    """Counters of a run; the data order and the learning rate follow from ``step``."""

    step: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evaluated_step: int = 0
    """The last step whose dev evaluation is done and logged."""

    def take_if_best(self, metric: float, *, larger: bool) -> bool:
        """Remembers a metric if it is the best so far; the first always is, NaN never after it."""
        if self.best_metric is not None and not math.isnan(self.best_metric):
            better = metric > self.best_metric if larger else metric < self.best_metric
            if not better:
                return False
        elif self.best_metric is not None and math.isnan(metric):
            return False
        self.best_metric, self.best_step = metric, self.step
        return True


def together(work: Callable[[], Result]) -> list[Result]:
    """Does ``work`` on every process; returns the results of all, by rank.

    Where it fails on one process it fails on all, so that none waits for one that has left.
    ``work`` itself must not communicate.

    Raises:
        DistributedError: Another process has left, or its error is none of `errors`.
        Exception: This process's own error, else that of the first process that failed.
    """
    if distributed.world_size() == 1:
        return [work()]
    result: Result | None = None
    own_error: Exception | None = None
    try:
        result = work()
    except Exception as error:
        own_error = error
    outcomes: list[Any] = [None] * distributed.world_size()
    try:
        dist.all_gather_object(outcomes, (result, _portable(own_error)))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise own_error or DistributedError("another process has left", why=reason) from None
    if own_error is not None:
        raise own_error
    for _, failure in outcomes:
        if failure is not None:
            kind, what, parts = failure
            raise kind(what, **parts)
    return [result for result, _ in outcomes]


def _portable(error: Exception | None) -> tuple[type[UserError], str, dict[str, str]] | None:
    """Takes an error apart for the way to other processes."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return type(error), error.what, {"why": error.why, "fix": error.fix, "kept": error.kept}
    return DistributedError, f"rank {distributed.rank()} failed: {error!r}", {}


def on_main(work: Callable[[], Result]) -> Result | None:
    """Does ``work`` on the first process; all get its result, or its error."""
    return together(lambda: work() if distributed.is_main() else None)[0]


# --- Saving -------------------------------------------------------------------------------------


class StateFiles(TorchCheckpointEngine):
    """How DeepSpeed's files go to disk and come back: hashed on the way, never run as code.

    A write that fails is remembered in ``failure`` and not raised: inside DeepSpeed's saving, the
    other processes would wait for this one for ever.
    """

    def __init__(self) -> None:
        self.name = "StateFiles"
        self.records: dict[Path, FileRecord] = {}
        self.failure: Exception | None = None
        self.step = 0

    def create(self, info: Any) -> None:
        """Is told that a save begins."""

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one of DeepSpeed's files."""
        try:
            with HashedFile(Path(path)) as file:
                torch.save(state_dict, file)  # type: ignore[arg-type]
                reach("save.deepspeed_file", step=self.step)
            self.records[Path(path)] = file.record()
        except Exception as error:
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one; refuses any class that is not known to belong there."""
        with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)


@dataclass(frozen=True, kw_only=True)
class StateParts:
    """What a save needs beside DeepSpeed's engine."""

    config: TrainConfig
    student: nn.Module
    """The module inside the engine, with or without LoRA."""
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]
    """Plain JSON for the manifest: what a resume must find again, see `check_same_facts`."""
    source: Path | None = None
    """The state that this run went on from; it is never deleted."""


def save_state(engine: Any, state: TrainState, parts: StateParts, folder: Path) -> None:
    """Commits ``folder/step-N`` by one rename, then deletes old states; all processes must call it.

    A state of this step that stands there already is left as it is.

    Raises:
        StorageError: No space, or no right to write; states committed before are untouched.
    """
    final = folder / f"step-{state.step}"
    draft = folder / f"{DRAFT}{final.name}"

    def on_disk(work: Callable[[], Result]) -> list[Result]:
        return together(lambda: _explained(work, folder, final))

    if on_main(final.exists):
        return
    try:
        on_disk(lambda: _start_draft(draft, state.step))
        files = engine.checkpoint_engine = StateFiles()
        files.step = state.step
        engine._copy_recovery_script = lambda _: None  # ours is `export`, without unpickling
        engine.save_checkpoint(str(draft), tag=DEEPSPEED_FOLDER, save_latest=False)
        weights = gather_weights(engine)
        records = on_disk(lambda: _write_parts(files, state, parts, weights, draft))
        everything = {name: record for own in records for name, record in own.items()}
        on_disk(lambda: _commit(draft, final, everything, state, parts))
    except Exception:
        if distributed.is_main():
            shutil.rmtree(draft, ignore_errors=True)
        raise


def _explained(work: Callable[[], Result], folder: Path, final: Path) -> Result:
    try:
        return work()
    except (OSError, RuntimeError, SafetensorError) as error:
        good = saved_states(folder)
        kept = f"last good: {good[-1]}" if good else "no state was saved before"
        raise storage_error(error, final, kept=kept) from None


def _start_draft(draft: Path, step: int) -> None:
    reach("save.start", step=step)
    if distributed.is_main():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)


def _write_parts(
    files: StateFiles,
    state: TrainState,
    parts: StateParts,
    weights: dict[str, Any] | None,
    draft: Path,
) -> dict[str, FileRecord]:
    """Writes what is not DeepSpeed's; returns the records of all files of this process."""
    reach("save.after_deepspeed", step=state.step)
    if files.failure is not None:
        raise files.failure
    records = {path.relative_to(draft).as_posix(): r for path, r in files.records.items()}
    name = _random_file(distributed.rank())
    records[name] = write_hashed(draft / name, to_safetensors(_random_state()))
    reach("save.after_random", step=state.step)
    if not distributed.is_main():
        return records
    write_model(parts.student, parts.tokenizer, draft / STUDENT_FOLDER, weights)
    for name, record in hash_folder(draft / STUDENT_FOLDER).items():
        records[f"{STUDENT_FOLDER}/{name}"] = record
    reach("save.after_student", step=state.step)
    content = {**dataclasses.asdict(state), "config": dataclasses.asdict(parts.config)}
    records[STATE_FILE] = write_hashed(draft / STATE_FILE, json.dumps(content, indent=2).encode())
    reach("save.after_state", step=state.step)
    return records


def _commit(
    draft: Path,
    final: Path,
    records: dict[str, FileRecord],
    state: TrainState,
    parts: StateParts,
) -> None:
    """Makes the draft a state, then deletes old ones; only the first process does anything."""
    if not distributed.is_main():
        return
    reach("save.before_manifest", step=state.step)
    course = json.dumps(_course(dataclasses.asdict(parts.config)), sort_keys=True)
    facts = {
        "step": state.step,
        "world_size": distributed.world_size(),
        **parts.facts,
        "config_sha256": hashlib.sha256(course.encode()).hexdigest(),
        "versions": versions(),
        "git_commit": git_commit(),
        "time": time.time(),
    }
    write_manifest(draft, records, facts)
    reach("save.after_manifest", step=state.step)
    os.rename(draft, final)
    reach("save.after_rename", step=state.step)
    sync(final.parent)
    reach("save.after_commit", step=state.step)
    stay = {path.resolve() for path in saved_states(final.parent)[-parts.config.run.keep :]}
    stay |= {path.resolve() for path in (final, parts.source) if path is not None}
    for old in step_folders(final.parent):
        if old.resolve() not in stay:
            delete_state(old)
    reach("save.end", step=state.step)


# --- Loading ------------------------------------------------------------------------------------


def load_state(engine: Any, folder: Path, device: torch.device, *, seed: int) -> TrainState:
    """Puts back what `save_state` saved; all processes must call it.

    Args:
        engine: As it was when the state was saved; with ZeRO stage 0 also of another number of
            processes.
        folder: A verified state.
        device: Of this process.
        seed: Of the run: makes the random state of processes that were not there before.

    Raises:
        CheckpointError: A part did not come back, or not the same one on all processes.
    """
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    state = TrainState(**{f.name: content[f.name] for f in dataclasses.fields(TrainState)})
    engine.checkpoint_engine = StateFiles()
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=DEEPSPEED_FOLDER)
    except Exception as error:  # DeepSpeed has no errors of its own for files that do not fit
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded", why=reason) from error
    if loaded is None:
        raise CheckpointError(f"{folder} holds no DeepSpeed state", why="files are missing")
    _check_loaded(engine, state, folder)
    rank, saved_ranks = distributed.rank(), read_manifest(folder)["world_size"]
    if rank < saved_ranks:
        _set_random_state(load_file(folder / _random_file(rank)), device)
    else:
        _seed_new_rank(seed, rank, state.step)
    if (now := distributed.world_size()) != saved_ranks and distributed.is_main():
        logger.warning(
            "%s was saved by %d processes, this run has %d: dropout differs from then on; "
            "the order of the data does not",
            *(folder, saved_ranks, now),
        )
    reach("resume.loaded", step=state.step)
    return state


def _check_loaded(engine: Any, state: TrainState, folder: Path) -> None:
    """Refuses a state of which a part did not come back."""
    if engine.global_steps != state.step:
        raise CheckpointError(
            f"{folder}: DeepSpeed is at step {engine.global_steps}, the counters at {state.step}"
        )
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if state.step > engine.skipped_steps:  # float16 may have skipped all so far
        owned = [p for group in optimizer.param_groups for p in group["params"] if p.numel() > 0]
        bare = [p for p in owned if not {"exp_avg", "exp_avg_sq"} <= optimizer.state[p].keys()]
        if bare:
            raise CheckpointError(
                f"{folder}: {len(bare)} of {len(owned)} parameters got no optimizer state back"
            )
    steps = together(lambda: state.step)
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"{folder}: the processes do not agree on the step", why=f"they read {steps}"
        )


def _random_file(rank: int) -> str:
    return f"random-{rank}.safetensors"


def _random_state() -> dict[str, Tensor]:
    """Returns the state of every generator of this process as tensors."""
    _, python_words, python_gauss = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    counters = [numpy_state["state"]["pos"], numpy_state["has_gauss"]]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_words),
        "python_gauss": torch.tensor(
            [] if python_gauss is None else [python_gauss], dtype=torch.float64
        ),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_counters": torch.tensor(counters),
        "numpy_gauss": torch.tensor(numpy_state["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_counters"].tolist()
    numpy_state = {"key": state["numpy"].numpy().astype(np.uint32), "pos": position}
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": numpy_state,
            "has_gauss": has_gauss,
            "gauss": state["numpy_gauss"].item(),
        }
    )
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _seed_new_rank(seed: int, rank: int, step: int) -> None:
    """Seeds the generators of a process that was not there when the state was saved."""
    number = int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
    torch.manual_seed(number)  # CUDA's too
    random.seed(number)
    np.random.seed(number)


# --- Finding ------------------------------------------------------------------------------------


def find_state(folder: RunFolder, resume: str) -> Path | None:
    """Returns the state to go on from as ``run.resume`` says, or None for a fresh start.

    The first process looks, verifies every byte, and tells what it passes over and clears away;
    the others learn its choice. The folder must be this run's own: what looks left behind by a
    process that died is removed.

    Raises:
        CheckpointError: ``must`` or a path, and there is no good state; or there are states, and
            none of them is good.
    """
    if resume == "never":
        return None
    return on_main(lambda: _find_state(folder, resume))


def _find_state(folder: RunFolder, resume: str) -> Path | None:
    reach("resume.start")
    for place in (folder.root, folder.state):
        for done in clean_leftovers(place):
            logger.warning("left by a process that died: %s", done)
    if resume not in ("auto", "must"):
        if damage := find_damage(Path(resume)):
            raise CheckpointError(f"run.resume={resume} is no saved state", why=damage)
        return Path(resume)
    good, damaged = newest_good_state(folder.state)
    if good is None and damaged:
        raise CheckpointError(
            f"every saved state of {folder.state} is damaged",
            why="; ".join(damaged.values()),
            fix="mend one, or start anew with another --run.output_dir",
            kept="nothing was changed",
        )
    if good is None and resume == "must":
        raise CheckpointError(f"run.resume=must, but {folder.state} holds no saved state")
    for path, damage in damaged.items():
        aside = _free_name(path.with_name(f"damaged-{path.name}"))
        os.rename(path, aside)  # this run will write that step again
        logger.warning("%s; it is now %s, going on from %s", damage, aside.name, good)
    reach("resume.verified")
    return good


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


# --- The same run -------------------------------------------------------------------------------


def check_same_config(state: Path, config: TrainConfig) -> None:
    """Refuses to go on with options that change the course of the run.

    With another number of processes micro-batch and accumulation may differ, as long as their
    product over all processes, the global batch, stays.

    Raises:
        CheckpointError: Lists each option that differs; or names the way for this number of
            processes.
    """
    saved = json.loads((state / STATE_FILE).read_text(encoding="utf-8"))["config"]
    before, now = _course(saved), _course(dataclasses.asdict(config))
    facts = read_manifest(state)
    if facts["world_size"] != distributed.world_size():
        _check_world_size(state, facts, config)
        for name in ("optim.micro_batch_size", "optim.accumulation"):
            now[name] = before[name]
    _refuse_differences(state, before, now)


def _refuse_differences(state: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    names = sorted(before.keys() | now.keys())
    different = [
        f"{name}: {before.get(name)} → {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if different:
        raise CheckpointError(
            f"{state} was saved with other options: {'; '.join(different)}",
            fix="give the same options, or a new --run.output_dir",
            kept="the saved state is untouched",
        )


def _check_world_size(state: Path, facts: dict[str, Any], config: TrainConfig) -> None:
    """Refuses a number of processes that the state cannot be continued with."""
    saved, now = facts["world_size"], distributed.world_size()
    what = f"{state} was saved by {saved} processes, this run has {now}"
    kept = "the saved state is untouched"
    if facts["zero_stage"] > 0:
        raise CheckpointError(
            what,
            why=f"ZeRO stage {facts['zero_stage']} keeps one part of the optimizer per process",
            fix=f"start {saved} processes; or train on from the weights alone: python -m "
            f"distilllens export {state} --to DIR, then --model.student DIR in a new run",
            kept=kept,
        )
    wanted, micro = facts["global_batch"], config.optim.micro_batch_size
    if micro * config.optim.accumulation * now == wanted:
        return
    share, rest = divmod(wanted, now)
    fitting = math.gcd(share, micro)
    raise CheckpointError(
        what,
        why=f"its global batch is {wanted} records, this run's "
        f"{micro * config.optim.accumulation * now}: records would be seen twice or never",
        fix=f"--optim.micro_batch_size {fitting} --optim.accumulation {share // fitting}"
        if not rest
        else f"start a number of processes that divides {wanted}",
        kept=kept,
    )


def check_same_facts(state: Path, facts: dict[str, Any]) -> None:
    """Refuses data, tokenizer or ZeRO stage that are not those of the state.

    Args:
        state: A verified state.
        facts: Of this run, as `StateParts` has them.

    Raises:
        CheckpointError: Lists what differs.
    """
    saved = read_manifest(state)
    names = ("data_fingerprint", "tokenizer_sha256", "zero_stage", "global_batch")
    _refuse_differences(state, {n: saved[n] for n in names}, {n: facts[n] for n in names})


def _course(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens the options that shape a run; how it is watched and where things lie do not."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if prefix + name in NOT_COURSE:
            continue
        if isinstance(value, dict):
            flat |= _course(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat | ({"run.seed": config["run"]["seed"]} if prefix == "" else {})
