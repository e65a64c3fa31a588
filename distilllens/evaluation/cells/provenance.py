"""Where a score comes from: the method's name, the weights, the settings, the versions.

Two results may stand side by side, or one may stand in for the other, only if their *identity*
is equal: weights, records, and every setting that changes an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distilllens.config import CE_ONLY, EvaluateConfig
from distilllens.data.records import Record

SAMPLER = 2
"""Raised whenever a seed gives other samples; 1: one random number for each token."""

SAMPLED_BLOCKS, BLOCK_BYTES = 256, 4096
"""Of each file of weights, 256 blocks of 4 KiB at equal distances enter the fingerprint."""


def identity(
    config: EvaluateConfig, *, checkpoint: str, records: Sequence[Record]
) -> dict[str, Any]:
    """Returns what a cell's answers depend on, beside its seed: one entry for each thing.

    The batch size is left out on purpose: answers do not depend on it (see `generation`).

    Args:
        config: The evaluation's configuration.
        checkpoint: From `checkpoint_fingerprint`.
        records: The set's records that are scored.
    """
    return {
        "weights and tokenizer": checkpoint,
        "records": _records_hash(records),
        **answer_settings(config),
    }


def answer_settings(config: EvaluateConfig) -> dict[str, Any]:
    """Returns the settings that change an answer: of an identity all but weights and records."""
    settings = config.eval
    return {
        "max_prompt_length": config.max_prompt_length,
        "dtype": config.dtype,
        "attention": config.attention,
        "backend": config.backend,
        "sampler": SAMPLER,
        "eval.do_sample": settings.do_sample,
        "eval.temperature": settings.temperature,
        "eval.top_p": settings.top_p,
        "eval.top_k": settings.top_k,
        "eval.no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "eval.max_new_tokens": settings.max_new_tokens,
    }


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Returns one text for each entry in which two identities differ."""
    keys = dict.fromkeys([*wanted, *stored])
    return [
        f"{key}: {stored.get(key)!r:.20} there, {wanted.get(key)!r:.20} now"
        for key in keys
        if stored.get(key) != wanted.get(key)
    ]


def checkpoint_fingerprint(path: str, revision: str | None = None) -> str:
    """Returns a hash of a model folder's config, tokenizer and weights, in well under a second.

    The contents count, not names or times, so a moved or copied folder keeps its fingerprint. Of
    the weights' bytes a sample is read: enough to tell two trainings apart, not two models that
    differ in a few numbers. A hub name is identified by its name and revision.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}@{revision or 'default branch'}"
    digest = hashlib.sha256()
    patterns = (
        "config.json",
        "adapter_config.json",
        "tokenizer*.json",
        "vocab*",
        "merges.txt",
        "*.model",
        "*.safetensors",
    )
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        for block in _sampled_blocks(file):
            digest.update(block)
    return digest.hexdigest()[:16]


def _sampled_blocks(file: Path) -> list[bytes]:
    """Returns blocks at equal distances; the whole file if it is small (configs, tokenizers)."""
    size = file.stat().st_size
    if file.suffix != ".safetensors" or size <= SAMPLED_BLOCKS * BLOCK_BYTES:
        return [file.read_bytes()]
    blocks = []
    with file.open("rb") as stream:
        for number in range(SAMPLED_BLOCKS):
            stream.seek(number * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
            blocks.append(stream.read(BLOCK_BYTES))
    return blocks


def _records_hash(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.prompt, list(record.outputs)]).encode())
    return digest.hexdigest()[:16]


def method_name(config: EvaluateConfig) -> str:
    """Returns the method's name for reports.

    The first of: ``name`` of the configuration; of the training run that wrote the checkpoint (its
    folder, one above, holds config.yaml) ``run.name`` or APPROACH/DIVERGENCE; the checkpoint's
    folder.
    """
    if config.name:
        return config.name
    checkpoint = Path(config.checkpoint)
    run = checkpoint.parent
    trained = _training_record(run / "config.yaml")
    if trained is not None:
        return trained
    return run.name if checkpoint.name in ("best", "latest") and run.name else checkpoint.name


def _training_record(file: Path) -> str | None:
    """Returns the name in a run's resolved configuration, or None if this is not one."""
    if not file.is_file():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    match content:
        case {"run": {"name": str(name)}} if name:
            return name
        case {"objective": {"approach": str(approach)}} if approach in CE_ONLY:
            return approach
        case {"objective": {"approach": str(approach), "divergence": str(divergence)}}:
            return f"{approach}/{divergence}"
    return None
