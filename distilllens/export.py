"""Models as Hugging Face folders, and `python -m distilllens export` out of a checkpoint."""

from __future__ import annotations

import argparse
import copy
import errno
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from distilllens import distributed
from distilllens.errors import (
    CheckpointError,
    ConfigError,
    StorageError,
    UserError,
    leave_code,
)
from distilllens.families import base_model
from distilllens.faults import reach
from distilllens.manifest import (
    draft_folder,
    find_damage,
    newest_good_state,
    read_manifest,
    replace_folder,
)
from distilllens.runs import RunFolder

STUDENT_FOLDER = "student"
"""Of a saved state: the student as a Hugging Face folder."""


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
    weights = gather_weights(engine)
    distributed.on_main(
        lambda: _replace(folder, lambda draft: write_model(student, tokenizer, draft, weights))
    )


def gather_weights(engine: Any) -> dict[str, Any] | None:
    """Collects the student's weights on the first process; all must call it.

    Returns:
        With ZeRO-3 the whole weights by name, on the first process. Without it None: every
        process has them in its module.
    """
    if not engine.zero_optimization_partition_weights():
        return None
    gathered = engine._zero3_consolidated_16bit_state_dict() or {}
    own = "student."  # what is trained along with the student, as projectors, stays behind
    return {name.removeprefix(own): w for name, w in gathered.items() if name.startswith(own)}


def write_model(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Any] | None,
) -> None:
    """Writes a Hugging Face folder, adapters merged, in the precision of the student's weights.

    Args:
        student: With or without LoRA; not changed.
        tokenizer: Goes along.
        folder: Made if it is not there.
        weights: Of ``student``, where its own are in parts; else None.
    """
    if isinstance(student, PeftModel):
        whole = copy.deepcopy(student) if weights is None else _with_weights(student, weights)
        student, weights = whole.merge_and_unload(), None
    model = base_model(student)
    model.save_pretrained(folder, state_dict=weights)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _with_weights(student: PeftModel, weights: dict[str, Any]) -> PeftModel:
    """Builds an adapted model like ``student`` around other weights, without making any."""
    base = base_model(student)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(base.config, dtype=base.dtype)
        assert isinstance(plain, PreTrainedModel)
        adapted = get_peft_model(plain, copy.deepcopy(student.peft_config["default"]))
    adapted.load_state_dict(weights, assign=True)
    plain.generation_config = copy.deepcopy(base.generation_config)
    assert isinstance(adapted, PeftModel)
    return adapted


def copy_model(source: Path, folder: Path) -> None:
    """Copies an exported model, on the first process; the copy appears at once.

    Raises:
        StorageError: No space, or no right to write.
    """
    distributed.on_main(lambda: _replace(folder, lambda draft: shutil.copytree(source, draft)))


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder beside its place, then puts it there."""
    draft = draft_folder(folder)
    try:
        write(draft)
        replace_folder(draft, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise storage_error(error, folder) from None


def storage_error(
    error: Exception, path: Path, *, kept: str = "models saved before are untouched"
) -> StorageError:
    """Explains a failed write, with the free space (torch and safetensors hide the errno)."""
    existing = next(p for p in [path, *path.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    is_full = free == 0 or "No space left" in text or getattr(error, "errno", 0) == errno.ENOSPC
    return StorageError(
        f"{'no space left: ' if is_full else ''}could not write {path} ({free / 1e9:.2f} GB free)",
        why=text,
        fix="free some space, or choose another --run.output_dir",
        kept=kept,
    )


# --- The command --------------------------------------------------------------------------------


def choose_state(path: Path) -> Path:
    """Returns the state that an argument of the command means, verified.

    Args:
        path: A folder ``step-N``, or a run's folder: its newest good state.

    Raises:
        CheckpointError: It is neither, or every state is damaged; the message names each.
    """
    states = RunFolder(path).state
    if not states.is_dir():
        if damage := find_damage(path):
            raise CheckpointError(
                f"{path} is no good checkpoint",
                why=damage,
                fix="give a folder step-N of a run's state/, or the run's folder",
            )
        return path
    good, damaged = newest_good_state(states)
    for damage in damaged.values():
        print(f"passed over: {damage}", file=sys.stderr)
    if good is None:
        raise CheckpointError(
            f"{states} holds no good checkpoint", why="; ".join(damaged.values()) or "it is empty"
        )
    return good


def export_state(state: Path, folder: Path) -> None:
    """Copies the student out of a verified state.

    Raises:
        ConfigError: ``folder`` is there already.
        StorageError: No space, or no right to write.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already", fix="choose another --to, or delete it")
    draft = draft_folder(folder)
    try:
        reach("export.verified")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(state / STUDENT_FOLDER, draft)
        reach("export.copied")
        replace_folder(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise storage_error(error, folder, kept=f"{state} is untouched") from None


def export_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="distilllens export",
        description="Write the student of a checkpoint as a Hugging Face folder: whatever the ZeRO "
        "stage and the number of processes, adapters merged, in the precision that was trained.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="RUN/state/step-N, or RUN for its newest good state"
    )
    parser.add_argument("--to", required=True, type=Path, help="folder of the model, a new one")
    arguments = parser.parse_args(argv)
    try:
        state = choose_state(arguments.checkpoint)
        export_state(state, arguments.to)
    except UserError as error:
        print(error.format(), file=sys.stderr)
        return leave_code(error.exit_code)
    print(f"{arguments.to}: the student of {state}, step {read_manifest(state)['step']}")
    return 0
