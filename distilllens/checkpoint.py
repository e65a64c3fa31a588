"""Models and training states on disk: folders that appear whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from distilllens import distributed
from distilllens.config import TrainConfig
from distilllens.errors import CheckpointError, StorageError
from distilllens.families import base_model
from distilllens.runs import RunFolder


def export_model(
    engine: Any, student: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes the student as a Hugging Face folder: safetensors, tokenizer, generation config.

    All processes must call it; the first writes. Adapters are merged. The folder is written beside
    its place and then renamed, so a reader finds the old or the new one whole.

    Args:
        engine: DeepSpeed engine that trains the student.
        student: The module inside it, with or without LoRA.
        tokenizer: Goes along.
        folder: Replaced if it exists.

    Raises:
        StorageError: No space, or no right to write.
    """
    state = _gathered_state(engine) if engine.zero_optimization_partition_weights() else None
    if distributed.is_main():
        draft = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        try:
            _write_model(student, tokenizer, draft, state)
            _replace_folder(draft, folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise storage_error(error, folder) from None
    distributed.barrier()


def _write_model(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Any] | None,
) -> None:
    merged = student
    if isinstance(student, PeftModel):
        merged = copy.deepcopy(student).merge_and_unload()
    model = base_model(merged)
    model.save_pretrained(folder, state_dict=state)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gathered_state(engine: Any) -> dict[str, Any]:
    """ZeRO-3: collects the student's full weights on the first process."""
    prefix = "student."
    gathered = engine._zero3_consolidated_16bit_state_dict() or {}
    return {name.removeprefix(prefix): weight for name, weight in gathered.items()}


def copy_model(source: Path, folder: Path) -> None:
    """Copies an exported model, on the first process; the copy appears at once.

    Raises:
        StorageError: No space, or no right to write.
    """
    if distributed.is_main():
        draft = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        try:
            shutil.copytree(source, draft)
            _replace_folder(draft, folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise storage_error(error, folder) from None
    distributed.barrier()


def _replace_folder(draft: Path, folder: Path) -> None:
    """Puts ``draft`` in the place of ``folder``; two renames, as no system swaps folders in one."""
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(draft, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def storage_error(error: Exception, path: Path) -> StorageError:
    """Explains a failed write, with the free space (torch and safetensors hide the errno)."""
    existing = next(p for p in [path, *path.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return StorageError(
        f"could not write {path} ({free / 1e9:.2f} GB free)",
        why=text,
        fix="free some space, or choose another --run.output_dir",
        kept="models saved before are untouched",
    )


# --- Training state -----------------------------------------------------------------------------


@dataclass
class TrainState:
    """Counters of a run; the data order and the learning rate follow from ``step``."""

    step: int = 0
    best_metric: float | None = None
    best_step: int = 0

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


STATE_FILE = "state.json"


def save_state(engine: Any, state: TrainState, config: TrainConfig, folder: Path) -> None:
    """Saves optimizer, weights, counters and every process's random state; all must call it.

    ``folder/step-N`` appears by one rename when all of it is written; older ones are then removed.

    Raises:
        StorageError: No space, or no right to write.
    """
    draft, final = folder / f".tmp-step-{state.step}", folder / f"step-{state.step}"
    if final.exists():
        return
    try:
        if distributed.is_main():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        distributed.barrier()
        engine.save_checkpoint(str(draft), tag="deepspeed", save_latest=False)
        save_file(_random_state(), draft / f"random-{distributed.rank()}.safetensors")
        distributed.barrier()
        if distributed.is_main():
            content = {
                **dataclasses.asdict(state),
                "world_size": distributed.world_size(),
                "config": dataclasses.asdict(config),
            }
            (draft / STATE_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")
            os.rename(draft, final)
            for old in saved_states(folder):
                if old != final:
                    shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise storage_error(error, folder) from None
    distributed.barrier()


def load_state(engine: Any, folder: Path, device: torch.device) -> TrainState:
    """Puts back what `save_state` saved; all processes must call it.

    Raises:
        CheckpointError: Another number of processes, or files that do not fit.
    """
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if content["world_size"] != distributed.world_size():
        raise CheckpointError(
            f"{folder} was saved by {content['world_size']} processes, "
            f"this run has {distributed.world_size()}",
            fix="start as many processes as before, or a new run with --run.output_dir",
        )
    loaded, _ = engine.load_checkpoint(str(folder), tag="deepspeed")
    if loaded is None:
        raise CheckpointError(f"{folder} holds no DeepSpeed state", why="files are missing")
    random_state = load_file(folder / f"random-{distributed.rank()}.safetensors")
    torch.set_rng_state(random_state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(random_state["cuda"], device)
    return TrainState(**{f.name: content[f.name] for f in dataclasses.fields(TrainState)})


def _random_state() -> dict[str, torch.Tensor]:
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def saved_states(folder: Path) -> list[Path]:
    """Returns the committed states of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_state(folder: RunFolder, resume: str) -> Path | None:
    """Returns the state to go on from as ``run.resume`` says, or None for a fresh start.

    Raises:
        CheckpointError: ``must`` or a path, and there is none.
    """
    if resume == "never":
        return None
    if resume not in ("auto", "must"):
        if not (Path(resume) / STATE_FILE).is_file():
            raise CheckpointError(
                f"run.resume={resume} is no saved state", why=f"it holds no {STATE_FILE}"
            )
        return Path(resume)
    states = saved_states(folder.state)
    if not states and resume == "must":
        raise CheckpointError(f"run.resume=must, but {folder.state} holds no saved state")
    return states[-1] if states else None


def check_same_config(state: Path, config: TrainConfig) -> None:
    """Refuses to go on with options that change the course of the run.

    Raises:
        CheckpointError: Lists each option that differs.
    """
    saved = json.loads((state / STATE_FILE).read_text(encoding="utf-8"))["config"]
    before, now = _course(saved), _course(dataclasses.asdict(config))
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


def _course(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens the options that shape a run; how it is watched and where a cache lies do not."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if prefix + name in ("run", "tracking", "dry_run", "debug", "model.teacher_cache"):
            continue
        if isinstance(value, dict):
            flat |= _course(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat | ({"run.seed": config["run"]["seed"]} if prefix == "" else {})
