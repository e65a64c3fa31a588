"""The teacher's hidden rows on disk: made once by `cache_teacher`, read instead of the teacher.

A cache is a folder of ``rows-00000.safetensors``, ``rows-00001.safetensors`` … (shards of
consecutive training records), ``head.safetensors`` (the teacher's LM head) and ``manifest.json``,
which is written last. A shard holds ``rows`` [R, 1 + K, E], the final layer first, then the paired
layers in order: what enters the head, normed. Every shard carries the key of the cache, so that a
stopped run goes on and rows of another teacher are never mixed in.

Shapes: R response rows of a shard, N response rows asked for, K paired layers, E teacher width,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from distilllens.config import TrainConfig
from distilllens.data.records import file_sha256
from distilllens.data.tokenize import PreparedData, response_rows
from distilllens.errors import CheckpointError, ConfigError
from distilllens.kernels.chunks import LogitTransform, Unembedding
from distilllens.models import vocab_rows
from distilllens.objective import Rows
from distilllens.runtime import shards
from distilllens.runtime.shards import Shard

FORMAT_VERSION = 1
"""Raised whenever the same key would give other bytes."""
STORED_DTYPES = {32: torch.float32, 16: torch.bfloat16, 8: torch.float8_e4m3fn}
"""8 bits: on SmolLM2-135M's normed rows float8_e4m3fn with one scale a row errs by 2.0 to 2.4 %
(relative L2 by layer) and int8 by 2.1 to 3.5 %: single dimensions stand out 9 to 16 times. (Scales
that are powers of two would decode exactly, but then err by 2.5 to 2.7 %: a row's peak, which is
much of its norm, is hit by the others.)"""
FLOAT8_MAX = 448.0

OPTION = "model.teacher_cache"
MANIFEST, HEAD = "manifest.json", "head.safetensors"
METADATA = "teacher_cache"
"""Entry of a file's safetensors metadata: what the tensors are of, as JSON."""
MANIFEST_PARTS = {"key", "records", "shards", "transform", "teacher_files"}
MAKE_IT = "python -m distilllens cache-teacher with this run's options"
MODEL_SUFFIXES = {".safetensors", ".bin", ".py"}
MODEL_FILES = {"config.json", "adapter_config.json", "model.safetensors.index.json"}


def shard_path(folder: Path, shard: Shard) -> Path:
    """Returns a shard's file in a cache's folder."""
    return folder / f"rows-{shard.number:05d}.safetensors"


# --- Rows as they are stored --------------------------------------------------------------------


def bytes_per_row(num_layers: int, width: int, bits: int) -> int:
    """Returns the bytes of one response token: the final and the paired layers, and scales."""
    scale_bytes = 2 if bits == 8 else 0
    return (1 + num_layers) * (width * bits // 8 + scale_bytes)


def encode_rows(rows: Tensor, bits: int) -> dict[str, Tensor]:
    """Returns what a shard stores of rows [..., E]: ``rows`` and, at 8 bits, ``scales`` [...].

    Scales are bfloat16, as decoded rows are: the peak of a row may be half a unit beyond float8's
    largest value then, and is rounded to that.
    """
    if bits != 8:
        return {"rows": rows.to(STORED_DTYPES[bits])}
    wide = rows.float()
    smallest = torch.finfo(torch.bfloat16).tiny  # a row of zeros must not be divided by 0
    scales = (wide.abs().amax(-1) / FLOAT8_MAX).clamp(min=smallest).bfloat16()
    return {"rows": (wide / scales.unsqueeze(-1)).to(STORED_DTYPES[8]), "scales": scales}


def decode_rows(stored: Mapping[str, Tensor]) -> Tensor:
    """Returns the rows [..., E] of what `encode_rows` gave: as stored, those of 8 bits bfloat16.

    A float8's bits, moved to where a bfloat16 has its own, are its value / 2**120 exactly; on a
    CPU that is nine times as fast as torch's conversion.
    """
    if "scales" not in stored:
        return stored["rows"]
    bits = stored["rows"].view(torch.int8).to(torch.int16)
    moved = (bits << 4) & ~0x780F  # the sign stays on top, 7 bits go below 4 of the exponent's 8
    return moved.view(torch.bfloat16).mul_(2.0**120).mul_(stored["scales"].unsqueeze(-1))


def relative_errors(rows: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """Returns ‖stored − row‖ / ‖row‖ of rows [..., E], float32; NaN where a row is not finite."""
    wide = rows.float()
    error = decode_rows(stored).float() - wide
    return error.norm(dim=-1) / wide.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)


# --- What a cache is of -------------------------------------------------------------------------


def cache_key(
    config: TrainConfig,
    *,
    teacher_config: PretrainedConfig,
    teacher_dtype: torch.dtype,
    teacher_layers: Sequence[int],
    data: PreparedData,
    known_files: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns everything that decides the cached rows, and the weight files' digests.

    Batch sizes, seeds, the order of records, the student's layers and the objective decide
    nothing. How many records there are is compared apart: more of them serve fewer.

    Args:
        config: Of the run.
        teacher_config: The teacher's.
        teacher_dtype: In which it computes.
        teacher_layers: Paired blocks, counted from 1.
        data: Tokenised records.
        known_files: Digests from an earlier call; a file of the same name, size and time of
            change is not read again.
    """
    model = config.model
    assert model.teacher is not None
    known = known_files or {}
    files: dict[str, Any] = {}
    if Path(model.teacher).is_dir():
        files["teacher"] = _digests(Path(model.teacher), known.get("teacher", {}))
        teacher = _joint_digest(files["teacher"])
    else:  # a hub's commit names its files as surely as their digests
        commit = getattr(teacher_config, "_commit_hash", None)
        if commit is None:
            raise ConfigError(f"model.teacher={model.teacher}: its commit is not known")
        teacher = f"{model.teacher}@{commit}"
    adapter = None
    if model.teacher_lora is not None:
        lora_folder = Path(model.teacher_lora)
        files["teacher_lora"] = _digests(lora_folder, known.get("teacher_lora", {}))
        adapter = _joint_digest(files["teacher_lora"])
    key = {
        "teacher": teacher,
        "teacher_lora": adapter,
        "teacher_dtype": str(teacher_dtype).removeprefix("torch."),
        "teacher_layers": list(teacher_layers),
        "lens_norm": config.objective.lens.norm,
        "vocab_size": vocab_rows(teacher_config),
        "data": data.fingerprint,
        "bits": model.teacher_cache_bits,
        "format_version": FORMAT_VERSION,
    }
    if model.teacher_quantization != "none":  # so that caches from before this option still serve
        key["teacher_quantization"] = model.teacher_quantization
    return key, files


def _digests(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns [size, time of change in ns, SHA-256] of each file that makes a model."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix in MODEL_SUFFIXES or path.name in MODEL_FILES:
            stat = path.stat()
            mark = [stat.st_size, stat.st_mtime_ns]
            before = known.get(path.name)
            is_known = before is not None and before[:2] == mark
            found[path.name] = before if is_known else [*mark, file_sha256(path)]
    return found


def _joint_digest(files: Mapping[str, Any]) -> str:
    text = "".join(f"{name} {digest}\n" for name, (_, _, digest) in files.items())
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_key(
    folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], *, exact: bool = False
) -> None:
    """Refuses a cache of something else.

    Args:
        folder: Of the cache.
        stored: Key of what is there.
        wanted: Key of this run.
        exact: Also refuse layers beyond those of this run; a reader just skips them.

    Raises:
        ConfigError: Names each part that differs, with both values.
    """
    layers = stored.get("teacher_layers")
    if not exact and isinstance(layers, list) and set(wanted["teacher_layers"]) <= set(layers):
        wanted = {**wanted, "teacher_layers": layers}
    fix = f"give another --model.teacher_cache, or remove that folder; then {MAKE_IT}"
    shards.check_same_key(OPTION, folder, stored, wanted, fix=fix)


# --- Files --------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a finished cache; None if there is no manifest.

    Raises:
        ConfigError: The folder holds something else than a cache.
    """
    is_folder = folder.is_dir()
    names = {path.name for path in folder.iterdir()} if is_folder else set()
    ours = (MANIFEST, HEAD)
    foreign = sorted(n for n in names if n not in ours and not n.startswith(("rows-", ".")))
    if foreign or (folder.exists() and not is_folder):
        raise ConfigError(
            f"model.teacher_cache={folder} holds other things than a teacher cache",
            why=f"for example {foreign[0]}" if foreign else "it is a file",
            fix="give an empty or new folder with --model.teacher_cache",
        )
    if MANIFEST not in names:
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or not manifest.keys() >= MANIFEST_PARTS:
        raise ConfigError(
            f"model.teacher_cache={folder}: its {MANIFEST} is not of a teacher cache",
            fix="give another --model.teacher_cache, or remove that file and make the cache again",
        )
    return manifest


def is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file that the manifest speaks of is there."""
    shards = [Shard(**shard) for shard in manifest["shards"]]
    return (folder / HEAD).is_file() and not missing_shards(folder, shards, manifest["key"])


def shard_metadata(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """Returns the key and the errors of a stored shard; None if it is not there or not whole."""
    try:
        with safe_open(shard_path(folder, shard), framework="pt") as file:
            stored = dict(json.loads(file.metadata()[METADATA]))
            rows = file.get_slice("rows").get_shape()[0]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None
    found = (stored.get("first"), stored.get("stop"), rows)
    return stored if found == (shard.first, shard.stop, shard.rows) else None


def missing_shards(folder: Path, shards: Sequence[Shard], key: Mapping[str, Any]) -> list[Shard]:
    """Returns the shards that are still to be made.

    Raises:
        ConfigError: A shard that is there has another key.
    """
    missing = []
    for shard in shards:
        stored = shard_metadata(folder, shard)
        if stored is None:
            missing.append(shard)
        else:
            check_same_key(folder, stored["key"], key, exact=True)
    return missing


# --- Reading ------------------------------------------------------------------------------------


class CachedTeacher:
    """Stands in for a `Teacher`: hands over its stored rows, which stay memory-mapped.

    Reading changes nothing in it, so it may be used from another thread.

    Args:
        folder: Of a finished cache.
        manifest: Its manifest.
        teacher_layers: Paired blocks wanted, counted from 1; all of them are stored.
        row_counts: Rows of each training record (int64), no more records than are stored.

    Raises:
        CheckpointError: A file of the cache is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        manifest: Mapping[str, Any],
        teacher_layers: Sequence[int],
        row_counts: np.ndarray,
    ) -> None:
        stored_layers = manifest["key"]["teacher_layers"]
        self._columns = [0, *(1 + stored_layers.index(layer) for layer in teacher_layers)]
        self._starts = np.concatenate([[0], np.cumsum(row_counts)])
        shards = [Shard(**s) for s in manifest["shards"] if s["first"] < len(row_counts)]
        self._firsts = [shard.first for shard in shards]
        self._tensors = [_map_shard(folder, shard, manifest["key"]) for shard in shards]
        for shard in shards:
            if shard.stop <= len(row_counts) and shard.rows != self._count(shard.first, shard.stop):
                raise _damaged(shard_path(folder, shard), "its rows are not those of the records")
        self._folder, self._transform = folder, manifest["transform"]

    def _count(self, first: int, stop: int) -> int:
        return int(self._starts[stop] - self._starts[first])

    def rows(self, records: Sequence[int]) -> Rows:
        """Returns what `Teacher.rows` gives for a collated batch of these records.

        Args:
            records: Indices of training records, in the order of the batch.

        Returns:
            Rows [N, E] on the CPU, bfloat16 (also of 8 bits) or float32; all are views of one
            contiguous tensor.
        """
        counts = [self._count(record, record + 1) for record in records]
        first_rows = self._tensors[0]["rows"]
        dtype = torch.float32 if first_rows.dtype == torch.float32 else torch.bfloat16
        size = (len(self._columns), sum(counts), first_rows.shape[-1])
        hidden_KNE = torch.empty(size, dtype=dtype)
        done = 0
        for record, count in zip(records, counts, strict=True):
            number = bisect_right(self._firsts, record) - 1
            start = self._count(self._firsts[number], record)
            for layer, column in enumerate(self._columns):
                place = (slice(start, start + count), column)
                stored = {name: tensor[place] for name, tensor in self._tensors[number].items()}
                hidden_KNE[layer, done : done + count] = decode_rows(stored)
            done += count
        return Rows(final=hidden_KNE[0], layers=list(hidden_KNE[1:]))

    def unembedding(self, device: torch.device | str = "cpu") -> Unembedding:
        """Returns the teacher's head, in the dtype in which the teacher computed.

        Raises:
            CheckpointError: Its file is missing or damaged.
        """
        path = self._folder / HEAD
        try:
            tensors = load_file(path, device=str(device))
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from None
        return Unembedding(
            head_VD=tensors["weight"],
            bias_V=tensors.get("bias"),
            transform=None if self._transform is None else LogitTransform(**self._transform),
        )


def _map_shard(folder: Path, shard: Shard, key: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a shard; their pages are read when they are used."""
    stored = shard_metadata(folder, shard)
    if stored is None:
        raise _damaged(
            shard_path(folder, shard), "it is missing, or not the shard that was written"
        )
    check_same_key(folder, stored["key"], key, exact=True)
    with safe_open(shard_path(folder, shard), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged",
        why=why,
        fix=f"{MAKE_IT} makes what is missing",
        kept="the other files of the cache",
    )


def open_teacher_cache(
    config: TrainConfig,
    *,
    teacher_config: PretrainedConfig,
    teacher_dtype: torch.dtype,
    teacher_layers: Sequence[int],
    data: PreparedData,
) -> CachedTeacher:
    """Opens the cache that ``model.teacher_cache`` names, if it is of this very teacher and data.

    Args:
        config: Of the run.
        teacher_config: The teacher's.
        teacher_dtype: In which it would compute.
        teacher_layers: Blocks of the layer pairs, counted from 1; a cache may hold more.
        data: Tokenised records; a cache may hold more of them.

    Raises:
        ConfigError: There is no finished cache, or one of something else: each part is named.
        CheckpointError: A file of it is missing or damaged.
    """
    assert config.model.teacher_cache is not None
    folder = Path(config.model.teacher_cache)
    manifest = read_manifest(folder)
    if manifest is None:
        there = "is not finished" if folder.is_dir() else "is not there"
        raise ConfigError(f"model.teacher_cache={folder} {there}", fix=f"make it first: {MAKE_IT}")
    key, _ = cache_key(
        config,
        teacher_config=teacher_config,
        teacher_dtype=teacher_dtype,
        teacher_layers=teacher_layers,
        data=data,
        known_files=manifest["teacher_files"],
    )
    check_same_key(folder, manifest["key"], key)
    if manifest["records"] < len(data.train):
        raise ConfigError(
            f"model.teacher_cache={folder} holds {manifest['records']:,} records, "
            f"this run has {len(data.train):,}",
            fix=f"{MAKE_IT} adds the others",
        )
    return CachedTeacher(
        folder,
        manifest=manifest,
        teacher_layers=teacher_layers,
        row_counts=response_rows(data.train),
    )
