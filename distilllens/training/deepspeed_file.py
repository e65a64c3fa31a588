"""A DeepSpeed file: stage, precision and offload; all else comes from the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from distilllens.config import TrainConfig
from distilllens.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILE_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""How the names of DeepSpeed's files say it."""
OURS_IN_DEEPSPEED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""Keys that come from the configuration's ``optim`` section instead."""
OFFLOAD_STAGES = {"offload_optimizer": 1, "offload_param": 3}
"""The ZeRO stage from which DeepSpeed can keep each on the CPU."""


def load_deepspeed_config(config: TrainConfig) -> tuple[dict[str, Any], torch.dtype]:
    """Reads the DeepSpeed file, adds what the configuration decides, and settles the precision.

    Raises:
        ConfigError: The file is missing, not JSON, or in conflict with the configuration.
    """
    path = Path(config.deepspeed)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        start = "" if path.is_absolute() else "; paths start at the project's root: call from there"
        raise ConfigError(
            f"deepspeed={path}: {(error.strerror or str(error)).lower()}",
            why="" if path.is_absolute() else f"it was looked for in {Path.cwd()}",
            fix=f"see configs/deepspeed/ for what there is{start}",
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed={path}: not JSON", why=str(error)) from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed={path}: expected a JSON object, got {content!r:.60}")
    if taken := [key for key in OURS_IN_DEEPSPEED if key in content]:
        raise ConfigError(
            f"deepspeed={path}: remove {', '.join(taken)}",
            why="batch, accumulation, clipping and optimizer come from the optim section",
        )
    for section in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(value := content.get(section, {}), dict):
            raise ConfigError(f"deepspeed={path}: {section} must be an object, got {value!r:.60}")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise ConfigError(f"deepspeed={path}: the ZeRO stage must be 0 to 3, got {stage!r:.60}")
    precision = _precision(content, path, stage)
    wanted = config.model.dtype
    if wanted not in ("auto", precision):
        raise ConfigError(
            f"model.dtype={wanted}, but {path} is for {FILE_PRECISIONS[precision]}",
            fix=f"choose configs/deepspeed/*_{FILE_PRECISIONS[wanted]}.json",
        )
    _check_offload(content, path, stage)
    optim = config.optim
    content |= {
        "train_micro_batch_size_per_gpu": optim.micro_batch_size,
        "gradient_accumulation_steps": optim.accumulation,
        # Without ZeRO the trainer clips: DeepSpeed would throw the gradient's norm away.
        "gradient_clipping": optim.clip_grad if stage > 0 else 0.0,
        "steps_per_print": 10**9,
        # With states on the CPU too it shall take our optimizer: its own one is compiled at the
        # start, and cannot refuse an update as `numerics_guard` asks.
        "zero_force_ds_cpu_optimizer": False,
    }
    return content, DTYPES[precision]


def _precision(content: dict[str, Any], path: Path, stage: int) -> str:
    """Returns the training precision of a DeepSpeed file, a key of `DTYPES`."""
    fp16, bf16 = content.get("fp16", {}), content.get("bf16", {})
    if fp16.get("enabled", False) and bf16.get("enabled", False):
        raise ConfigError(f"deepspeed={path}: fp16 and bf16 are both on")
    if fp16.get("enabled", False):
        if stage == 0:
            raise ConfigError(
                f"deepspeed={path}: fp16 needs ZeRO stage 1 or more",
                fix="--deepspeed configs/deepspeed/zero1_fp16.json, also with one process",
            )
        if fp16.get("loss_scale", 0) != 0:
            raise ConfigError(
                f"deepspeed={path}: fp16.loss_scale={fp16['loss_scale']!r:.60} must be 0, dynamic",
                why="with a fixed scale a run can skip its steps for ever",
            )
        return "float16"
    if bf16.get("enabled", False):
        if stage == 0:
            raise ConfigError(
                f"deepspeed={path}: bf16 needs ZeRO stage 1 or more",
                why="stage 0 makes the first bf16 updates too small",
                fix="--deepspeed configs/deepspeed/zero1_bf16.json, also with one process",
            )
        return "bfloat16"
    return "float32"


def _check_offload(content: dict[str, Any], path: Path, stage: int) -> None:
    """Refuses offload that DeepSpeed would not do, or not with this optimizer."""
    for name, least in OFFLOAD_STAGES.items():
        offload = content.get("zero_optimization", {}).get(name)
        if offload is None:
            continue
        if not isinstance(offload, dict):
            raise ConfigError(
                f"deepspeed={path}: {name} must be an object, got {offload!r:.60}",
                fix=f'"{name}": {{"device": "cpu"}}, or leave it out',
            )
        device = offload.get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"deepspeed={path}: {name}.device must be none or cpu, got {device!r:.60}"
            )
        if device == "cpu" and stage < least:
            raise ConfigError(
                f"deepspeed={path}: {name} needs ZeRO stage {least} or more, the file has {stage}"
            )
        if device == "cpu" and offload.get("ratio", 1.0) != 1.0:
            raise ConfigError(
                f"deepspeed={path}: {name}.ratio must be 1",
                why="states on both sides need DeepSpeed's own optimizer",
            )
