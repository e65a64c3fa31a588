"""Runs the teacher once over all training records: `python -m distilllens cache-teacher`.

It takes the options of the training that will read the cache. Several processes share the work:
`torchrun --nproc_per_node 4 -m distilllens cache-teacher …`.

Shapes: B batch, T tokens, N response rows of a batch, R of a shard, K paired layers, E teacher
width.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distilllens.config import TrainConfig
from distilllens.data.collate import collate_columns
from distilllens.data.progress import track
from distilllens.data.tokenize import PreparedData, record_lengths, response_rows
from distilllens.errors import (
    ConfigError,
    NumericsError,
    StorageError,
)
from distilllens.kernels.chunks import LogitTransform, Unembedding
from distilllens.runs import write_json
from distilllens.runtime import distributed
from distilllens.runtime.shards import (
    Shard,
    cut_shards,
    open_folder,
    shards_missing,
    unwritable_shard,
)
from distilllens.runtime.signals import Stopped, StopRequest
from distilllens.student import Teacher
from distilllens.teacher.cache import (
    HEAD,
    MANIFEST,
    METADATA,
    OPTION,
    bytes_per_row,
    cache_key,
    check_same_key,
    encode_rows,
    is_whole,
    missing_shards,
    read_manifest,
    relative_errors,
    shard_metadata,
    shard_path,
)
from distilllens.training.setup import Plan, load_data, plan_run, run_teacher

SHARD_BYTES = 256 * 2**20
"""Shards are as large as this, or one record: what a killed run loses at most."""
SPARE_DISK = 1.05
"""Free space that must be there, as a share of what will be written."""


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """What a cache will be made of, and what is still to be made."""

    plan: Plan
    data: PreparedData
    folder: Path
    key: dict[str, Any]
    teacher_files: dict[str, Any]
    teacher: Teacher
    row_counts: np.ndarray
    row_bytes: int
    shards: list[Shard]
    missing: list[Shard]

    @property
    def missing_bytes(self) -> int:
        """What will be written: rows and head."""
        head = self.teacher.unembedding().head_VD
        rows = sum(shard.rows for shard in self.missing) * self.row_bytes
        return rows + head.numel() * head.element_size()


def cache_teacher(config: TrainConfig, device: torch.device, stop: StopRequest) -> None:
    """Makes what is missing of the cache that ``model.teacher_cache`` names.

    Args:
        config: Of the training that will read it. With ``dry_run`` nothing is written.
        device: Of this process.
        stop: Signals; ``run.max_wall_time`` does not matter, as each shard is kept anyway.

    Raises:
        ConfigError: No folder named, no teacher needed, or the folder holds something else.
        StorageError: Too little space, or no right to write.
        NumericsError: The teacher gives rows that are not finite.
        Stopped: SIGINT or SIGTERM.
    """
    console = Console(quiet=not distributed.is_main(), soft_wrap=True, highlight=False)
    job = plan_cache(config, device, console)
    if job is None:
        return
    free = _free_bytes(job.folder)
    rows = sum(shard.rows for shard in job.shards)
    there = len(job.shards) - len(job.missing)
    console.print(
        f"{job.folder}: {rows:,} response tokens × {decimal(job.row_bytes)} = "
        f"{decimal(rows * job.row_bytes)} in {len(job.shards)} shards, {there} there already; "
        f"{decimal(free)} free"
    )
    if free < SPARE_DISK * job.missing_bytes:
        raise StorageError(
            f"model.teacher_cache={job.folder} needs {decimal(job.missing_bytes)} more, "
            f"{decimal(free)} are free",
            fix="free some space, choose another --model.teacher_cache, or store less: "
            "--model.teacher_cache_bits 8, --objective.lens.count, --data.train_size",
            kept=f"{there} shards",
        )
    if config.dry_run:
        console.print("dry run: nothing was written")
        return
    make_cache(job, device, stop, console)


def plan_cache(config: TrainConfig, device: torch.device, console: Console) -> CacheJob | None:
    """Loads data and teacher and finds what is missing; None: nothing is.

    Raises:
        ConfigError: As `cache_teacher`.
    """
    if config.model.teacher_cache is None:
        raise ConfigError("cache-teacher needs --model.teacher_cache, the folder to write")
    if config.model.teacher_placement != "device" and distributed.world_size() > 1:
        raise ConfigError(
            f"cache-teacher by several processes needs model.teacher_placement=device, not "
            f"{config.model.teacher_placement}",
            why="each takes records of its own, and parts are gathered by all together",
            fix="start one process, with --model.teacher_placement cpu if the teacher does not fit",
        )
    plan, folder = plan_run(config), Path(config.model.teacher_cache)
    if plan.teacher_config is None:
        raise ConfigError(
            "without a teacher there is nothing to cache",
            why=f"objective.approach={config.objective.approach} with objective.kd_ratio="
            f"{config.objective.kd_ratio} compares with none",
        )
    data = load_data(plan)
    console.print(data.summary())
    layers = [pair.teacher for pair in plan.objective.pairs]
    manifest = read_manifest(folder)
    key, teacher_files = cache_key(
        config,
        teacher_config=plan.teacher_config,
        teacher_dtype=plan.teacher_dtype,
        teacher_layers=layers,
        data=data,
        known_files=manifest and manifest["teacher_files"],
    )
    if manifest is not None:
        check_same_key(folder, manifest["key"], key)
        if manifest["records"] >= len(data.train) and is_whole(folder, manifest):
            console.print(f"{folder}: all is there already")
            return None
    console.print("loading the teacher …")
    teacher = run_teacher(plan, data, device)
    row_counts = response_rows(data.train)
    width = teacher.unembedding().head_VD.shape[1]
    row_bytes = bytes_per_row(len(layers), width, config.model.teacher_cache_bits)
    shards = cut_shards(row_counts, max(1, SHARD_BYTES // row_bytes))
    return CacheJob(
        plan=plan,
        data=data,
        folder=folder,
        key=key,
        teacher_files=teacher_files,
        teacher=teacher,
        row_counts=row_counts,
        row_bytes=row_bytes,
        shards=shards,
        missing=missing_shards(folder, shards, key),
    )


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(existing).free


# --- Making it ----------------------------------------------------------------------------------


def make_cache(job: CacheJob, device: torch.device, stop: StopRequest, console: Console) -> None:
    """Makes the missing shards, each process its share, and then the manifest.

    Raises:
        StorageError, NumericsError, Stopped: As `cache_teacher`.
    """
    distributed.barrier()  # all have read the manifest that goes now
    if distributed.is_main():
        open_folder(OPTION, job.folder, job.folder / MANIFEST)
    own = job.missing[distributed.rank() :: distributed.world_size()]
    own_rows = sum(shard.rows for shard in own)
    started = time.monotonic()
    with (
        stop.listening(),
        track("caching", "response tokens", total=own_rows, console=console) as advance,
    ):
        for shard in own:
            tensors, error_sums = compute_shard(job, shard, device, stop, advance)
            write_shard(job.folder, shard, tensors, key=job.key, error_sums=error_sums)
    seconds = time.monotonic() - started
    distributed.barrier()
    if distributed.is_main():
        errors = finish(job)
        told = ", ".join(f"{name} {error:.2%}" for name, error in errors.items())
        console.print(
            f"{job.folder}: done, {own_rows / max(seconds, 1e-9):,.0f} response tokens/s per "
            f"process; relative error of what is stored: {told}"
        )
    distributed.barrier()


@torch.inference_mode()
def compute_shard(
    job: CacheJob,
    shard: Shard,
    device: torch.device,
    stop: StopRequest,
    advance: Callable[[int], None],
) -> tuple[dict[str, Tensor], list[float]]:
    """Runs the teacher over a shard's records, batches of similar length at a time.

    Returns:
        What `write_shard` takes: the tensors, and the sum of the relative errors by layer.
    """
    config, train = job.plan.config, job.data.train
    counts = job.row_counts[shard.first : shard.stop]
    ends = np.cumsum(counts)
    lengths = record_lengths(train.select(range(shard.first, shard.stop)))
    budget = config.optim.micro_batch_size * config.data.max_length
    tensors: dict[str, Tensor] = {}
    errors_K = torch.zeros(1 + len(job.teacher.layers), dtype=torch.float64, device=device)
    for members in length_batches(lengths, budget):
        if stop.received:
            raise _stopped(stop)
        columns = train[[shard.first + member for member in members]]
        batch = collate_columns(columns, pad_id=job.plan.tokenizer.eos_token_id).to(device)
        rows = job.teacher.rows(batch.input_ids_BT, batch.rows_N)
        hidden_NKE = torch.stack([rows.final, *rows.layers], dim=1)
        stored = encode_rows(hidden_NKE, config.model.teacher_cache_bits)
        errors_K += relative_errors(hidden_NKE, stored).double().sum(0)
        for name, values in stored.items():
            if name not in tensors:
                tensors[name] = torch.empty(shard.rows, *values.shape[1:], dtype=values.dtype)
            parts = values.cpu().split(counts[members].tolist())
            for member, part in zip(members, parts, strict=True):
                tensors[name][ends[member] - counts[member] : ends[member]] = part
        advance(batch.num_tokens)
    if not errors_K.isfinite().all():
        raise NumericsError(
            f"training records {shard.first} to {shard.stop - 1}: the teacher's hidden rows are "
            "not all finite",
            fix="--model.teacher_dtype float32",
        )
    return tensors, errors_K.tolist()


def length_batches(lengths: np.ndarray, budget: int) -> Iterator[list[int]]:
    """Yields all record numbers, the longest first, in batches of ``budget`` padded tokens."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        size = max(1, budget // int(lengths[order[0]]))
        yield order[:size].tolist()
        order = order[size:]


def _stopped(stop: StopRequest) -> Stopped:
    return Stopped(
        f"{signal.Signals(stop.received).name}: the finished shards are kept",
        code=128 + stop.received,
        fix=f"go on with: {stop.resume_command}",
    )


def finish(job: CacheJob) -> dict[str, float]:
    """Writes head and manifest; returns the mean relative error of the rows by layer.

    Raises:
        StorageError: A shard that another process wrote is not there; as `write_manifest`.
    """
    stored = [shard_metadata(job.folder, shard) for shard in job.shards]
    if any(metadata is None for metadata in stored):
        raise shards_missing(OPTION, job.folder)
    sums_K = np.sum([metadata["error_sums"] for metadata in stored if metadata], axis=0)
    rows = sum(shard.rows for shard in job.shards)
    names = ["final", *(f"L{layer:02d}" for layer in job.teacher.layers)]
    errors = dict(zip(names, (sums_K / max(1, rows)).tolist(), strict=True))
    content = {
        "key": job.key,
        "records": len(job.row_counts),
        "rows": rows,
        "bytes_per_row": job.row_bytes,
        "relative_error": errors,
        "shards": [dataclasses.asdict(shard) for shard in job.shards],
        "teacher_files": job.teacher_files,
    }
    write_manifest(job.folder, content, job.teacher.unembedding())
    return errors


# --- Writing it ---------------------------------------------------------------------------------


def write_manifest(folder: Path, content: Mapping[str, Any], head: Unembedding) -> None:
    """Writes the head and then the manifest: the cache is now whole.

    Raises:
        StorageError: No space, or no right to write.
    """
    tensors = {"weight": head.head_VD.detach().cpu().contiguous()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.detach().cpu().contiguous()
    transform = None
    if head.transform is not None:
        assert isinstance(head.transform, LogitTransform)
        transform = dataclasses.asdict(head.transform)
    _write_tensors(folder / HEAD, tensors, {})
    try:
        write_json(folder / MANIFEST, {**content, "transform": transform})
    except OSError as error:
        raise unwritable_shard(OPTION, folder / MANIFEST, error) from None


def write_shard(
    folder: Path,
    shard: Shard,
    tensors: dict[str, Tensor],
    *,
    key: Mapping[str, Any],
    error_sums: Sequence[float],
) -> None:
    """Writes a shard, which appears whole or not at all.

    Args:
        folder: Of the cache; made if it is not there.
        shard: What the tensors are of.
        tensors: ``rows`` [R, 1 + K, E] and, at 8 bits, ``scales`` [R, 1 + K].
        key: Of the cache.
        error_sums: Sum over the rows of the relative error, for each layer.

    Raises:
        StorageError: No space, or no right to write.
    """
    content = {"key": key, "first": shard.first, "stop": shard.stop, "error_sums": error_sums}
    _write_tensors(shard_path(folder, shard), tensors, content)


def _write_tensors(path: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One entry: safetensors writes several in any order, and the bytes should repeat.
        save_file(tensors, draft, {METADATA: json.dumps(about)})
        with draft.open("rb") as file:
            os.fsync(file.fileno())  # else a crash of the machine could leave a name without bytes
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise unwritable_shard(OPTION, path, error) from None
