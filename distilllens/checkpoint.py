"""Training states on disk: committed whole, verified, rotated, loaded.

A state ``RUN/state/step-N`` holds DeepSpeed's files, every process's random state, the student as a
Hugging Face folder, and ``state.json``; `manifest` says when it counts as one, `resume` which one a
run goes on from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distilllens.config import TrainConfig
from distilllens.errors import CheckpointError
from distilllens.publish.card_facts import CardFacts
from distilllens.publish.export import (
    STUDENT_FOLDER,
    gather_weights,
    storage_error,
    write_model,
)
from distilllens.runs import git_commit, redact, versions
from distilllens.runtime import distributed
from distilllens.runtime.distributed import Result, on_main, together
from distilllens.runtime.faults import reach
from distilllens.runtime.manifest import (
    DRAFT,
    FileRecord,
    HashedFile,
    delete_state,
    hash_folder,
    read_manifest,
    saved_states,
    step_folders,
    sync,
    write_hashed,
    write_manifest,
)
from distilllens.runtime.random_state import random_state, seed_new_rank, set_random_state
from distilllens.training.resume import STATE_FILE, course_of

DEEPSPEED_FOLDER = "deepspeed"
DEEPSPEED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""All that DeepSpeed's files may hold beside tensors and plain values."""

logger = logging.getLogger("distilllens")


@dataclass
class TrainState:
    """Counters of a run; the data order and the learning rate follow from ``step``."""

    step: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evaluated_step: int = 0
    """The last step whose dev evaluation is done and logged."""
    tracker_id: str = ""
    """Of this run at the tracker, so that a resumed run goes on there too."""

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
    """Plain JSON for the manifest: what a resume must find again, see `resume.check_same_facts`."""
    sums: dict[str, Tensor]
    """What this process has added up since the last line of metrics."""
    source: Path | None = None
    """The state that this run went on from; it is never deleted."""
    card: CardFacts | None = None
    """Of the student's card, on the first process."""


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
    name = _rank_file(distributed.rank())
    own = {**_prefixed(RANDOM, random_state()), **_prefixed(SUMS, parts.sums)}
    records[name] = write_hashed(draft / name, to_safetensors(own))
    reach("save.after_random", step=state.step)
    if not distributed.is_main():
        return records
    student_folder, sampling = draft / STUDENT_FOLDER, parts.config.eval
    write_model(
        *(parts.student, parts.tokenizer, student_folder, weights),
        sampling=sampling,
        card=parts.card,
    )
    for name, record in hash_folder(student_folder).items():
        records[f"{STUDENT_FOLDER}/{name}"] = record
    reach("save.after_student", step=state.step)
    content = {**dataclasses.asdict(state), "config": dataclasses.asdict(parts.config)}
    text = redact(json.dumps(content, indent=2))
    records[STATE_FILE] = write_hashed(draft / STATE_FILE, text.encode())
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
    course = json.dumps(course_of(parts.config), sort_keys=True)
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


def load_state(
    engine: Any, folder: Path, device: torch.device, *, seed: int
) -> tuple[TrainState, list[dict[str, Tensor]]]:
    """Puts back what `save_state` saved; all processes must call it.

    Args:
        engine: As it was when the state was saved; with ZeRO stage 0 also of another number of
            processes.
        folder: A verified state.
        device: Of this process.
        seed: Of the run: makes the random state of processes that were not there before.

    Returns:
        The counters; and ``StateParts.sums`` of each process that saved and whose share falls to
        this one: with another number of processes some get several, or none.

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
        refusal = CheckpointError(f"{folder} cannot be loaded", why=reason)
        refusal.everywhere = distributed.world_size() == 1  # else perhaps by this one alone
        raise refusal from error
    if loaded is None:
        raise CheckpointError(f"{folder} holds no DeepSpeed state", why="files are missing")
    _check_loaded(engine, state, folder)
    rank, saved_ranks = distributed.rank(), read_manifest(folder)["world_size"]
    now = distributed.world_size()
    own = [load_file(folder / _rank_file(r)) for r in range(rank, saved_ranks, now)]
    if own:
        set_random_state(_without_prefix(RANDOM, own[0]), device)
    else:
        seed_new_rank(seed, rank, state.step)
    if now != saved_ranks and distributed.is_main():
        logger.warning(
            "%s was saved by %d processes, this run has %d: dropout differs from then on; "
            "the order of the data does not",
            *(folder, saved_ranks, now),
        )
    reach("resume.loaded", step=state.step)
    return state, [_without_prefix(SUMS, saved) for saved in own]


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


RANDOM, SUMS = "random.", "sums."


def _rank_file(rank: int) -> str:
    """Returns the name of what each process has of its own."""
    return f"rank-{rank}.safetensors"


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
