"""Stored teacher rows: exact to their bits, for every family, and read only where asked for."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from datasets import Dataset
from model_zoo import VOCAB, build
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from distilllens.commands import cache_teacher
from distilllens.commands.cache_teacher import (
    CacheJob,
    length_batches,
    make_cache,
    missing_shards,
)
from distilllens.config import load_config
from distilllens.data.collate import Batch, collate
from distilllens.data.tokenize import PreparedData, response_rows
from distilllens.errors import CheckpointError, ConfigError
from distilllens.lens import LogitLens
from distilllens.runtime.shards import cut_shards
from distilllens.runtime.signals import StopRequest
from distilllens.student import Teacher
from distilllens.teacher.cache import (
    CachedTeacher,
    bytes_per_row,
    check_same_key,
    decode_rows,
    encode_rows,
    read_manifest,
    relative_errors,
    shard_path,
)
from distilllens.training.setup import Plan, plan_run

CPU = torch.device("cpu")
LAYERS = [1, 3]
LENGTHS = [(5, 4), (0, 3), (1, 1), (0, 1), (7, 1), (9, 23), (2, 30), (3, 9), (12, 2), (1, 17)]
"""Prompt and response tokens of the records: no prompt, one response token, the longest first."""


@pytest.fixture
def plan(workspace: Workspace) -> Plan:
    return plan_run(
        load_config(workspace.flags("--data.max_length", "32", "--data.max_prompt_length", "16"))
    )


def records() -> Dataset:
    generator = random.Random(5)
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "response_ids": []}
    for sizes in LENGTHS:
        for name, size in zip(columns, sizes, strict=True):
            columns[name].append([generator.randrange(1, VOCAB) for _ in range(size)])
    return Dataset.from_dict(columns)


def make_job(
    plan: Plan, folder: Path, model: PreTrainedModel, *, bits: int = 32, layers: list[int] = LAYERS
) -> CacheJob:
    model_config = dataclasses.replace(plan.config.model, teacher_cache_bits=bits)  # type: ignore[arg-type]
    config = dataclasses.replace(plan.config, model=model_config)
    teacher = Teacher(LogitLens(model), layers)
    train = records()
    counts = response_rows(train)
    row_bytes = bytes_per_row(len(layers), teacher.unembedding().head_VD.shape[1], bits)
    shards = cut_shards(counts, cache_teacher.SHARD_BYTES // row_bytes)
    return CacheJob(
        plan=dataclasses.replace(plan, config=config),
        data=PreparedData(
            train=train, dev=train, folder=folder, source={}, fingerprint="x", stats={}
        ),
        folder=folder,
        key={"teacher_layers": layers, "bits": bits},
        teacher_files={},
        teacher=teacher,
        row_counts=counts,
        row_bytes=row_bytes,
        shards=shards,
        missing=shards,
    )


def make(job: CacheJob) -> None:
    make_cache(job, CPU, StopRequest(), Console(quiet=True))


def read(job: CacheJob, layers: list[int] = LAYERS) -> CachedTeacher:
    manifest = read_manifest(job.folder)
    assert manifest is not None
    return CachedTeacher(
        job.folder, manifest=manifest, teacher_layers=layers, row_counts=job.row_counts
    )


def batch_of(job: CacheJob, members: list[int]) -> Batch:
    return collate([job.data.train[member] for member in members], pad_id=0)


def online(job: CacheJob, members: list[int]) -> Tensor:
    """Rows [1 + K, N, E] of the teacher itself."""
    batch = batch_of(job, members)
    rows = job.teacher.rows(batch.input_ids_BT, batch.rows_N)
    return torch.stack([rows.final, *rows.layers])


def cached(teacher: CachedTeacher, members: list[int]) -> Tensor:
    rows = teacher.rows(members)
    return torch.stack([rows.final, *rows.layers])


# --- Rows as they are stored --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_keeps_what_it_can_show_exactly(dtype: torch.dtype) -> None:
    """By hand: e4m3 has 448, 240, 1.125 and 2**-9; the largest of a row is mapped to 448."""
    row = torch.tensor([448.0, -240.0, 1.125, 2**-9, 0.0])
    rows = torch.stack([row * 2.0**power for power in (-20, -3, 0, 9)]).to(dtype)
    stored = encode_rows(rows, 8)
    assert stored["rows"].dtype == torch.float8_e4m3fn and stored["rows"].shape == (4, 5)
    assert stored["scales"].tolist() == [2.0**-20, 2.0**-3, 1.0, 2.0**9]
    assert torch.equal(decode_rows(stored).float(), rows.float())
    assert decode_rows(stored).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(7, 3, 33), (1, 1, 1), (0, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_error_is_bounded_with_outliers_of_any_size(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Half a unit of 3 mantissa bits is 1/16, of bfloat16's 7 bits 1/256; small values lose more.

    Below 2**-6 scales, half a unit is 2**-10 scales.
    """
    torch.manual_seed(1)
    rows = torch.randn(size)
    rows[..., :1] *= 10.0 ** torch.randint(-12, 12, rows[..., :1].shape)
    rows = rows.to(dtype)
    stored = encode_rows(rows, 8)
    error = (decode_rows(stored).double() - rows.double()).abs()
    bound = rows.double().abs() * (1 / 16 + 1 / 256 + 1 / 4096) + 2**-10 * stored[
        "scales"
    ].double().unsqueeze(-1)
    assert (error <= bound * (1 + 1e-5)).all()
    expected = error.norm(dim=-1) / rows.double().norm(dim=-1)
    torch.testing.assert_close(relative_errors(rows, stored).double(), expected, rtol=1e-4, atol=0)


def test_every_float8_value_comes_back_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = values[~values.float().isnan()]
    stored = {
        "rows": finite.repeat(3, 1),
        "scales": torch.tensor([1.0, 2.0**-60, 2.0**40]).bfloat16(),
    }
    expected = finite.double() * stored["scales"].double().unsqueeze(-1)
    assert torch.equal(decode_rows(stored).double(), expected)


def test_a_row_of_zeros_stays_zero() -> None:
    stored = encode_rows(torch.zeros(2, 4), 8)
    assert torch.equal(decode_rows(stored).float(), torch.zeros(2, 4))
    assert relative_errors(torch.zeros(2, 4), stored).tolist() == [0, 0]


def test_16_and_32_bits_are_a_rounding_and_the_rows() -> None:
    rows = torch.randn(5, 3, 7)
    assert torch.equal(encode_rows(rows, 32)["rows"], rows)
    assert torch.equal(encode_rows(rows, 16)["rows"], rows.bfloat16())
    assert relative_errors(rows, encode_rows(rows, 32)).max() == 0
    assert 0 < relative_errors(rows, encode_rows(rows, 16)).max() < 2**-8
    assert torch.equal(encode_rows(rows.bfloat16(), 32)["rows"], rows.bfloat16().float())


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_bytes_per_row_are_those_of_the_tensors(bits: int) -> None:
    stored = encode_rows(torch.randn(3, 1 + 4, 33), bits)
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == 3 * bytes_per_row(4, 33, bits)


def test_gpt2_xl_with_five_layers_takes_19_kilobytes() -> None:
    assert bytes_per_row(5, 1600, 16) == 19_200


# --- Shards and batches -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_shards_hold_all_records_in_order_within_the_size(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 40, size=50)
    shards = cut_shards(counts, 25)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    covered = [record for shard in shards for record in range(shard.first, shard.stop)]
    assert covered == list(range(50))
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        assert shard.rows == counts[shard.first : shard.stop].sum()
        assert shard.rows <= 25 or shard.stop == shard.first + 1
        if after is not None:  # as large as it can be
            assert shard.rows + counts[after.first] > 25
    fewer = cut_shards(counts[:30], 25)
    assert fewer[:-1] == shards[: len(fewer) - 1]


def test_shards_of_single_rows_by_hand() -> None:
    cuts = [(shard.first, shard.stop, shard.rows) for shard in cut_shards([1] * 23, 10)]
    assert cuts == [(0, 10, 10), (10, 20, 10), (20, 23, 3)]
    assert cut_shards([], 10) == []


def test_batches_keep_to_the_budget_and_lose_nothing() -> None:
    lengths = np.array([3, 50, 7, 7, 1, 20, 19, 2])
    batches = list(length_batches(lengths, 40))
    assert sorted(record for batch in batches for record in batch) == list(range(8))
    assert batches[0] == [1]  # longer than the budget, and alone
    for batch in batches[1:]:
        assert len(batch) * lengths[batch].max() <= 40
    assert len(batches) == 3


# --- What is read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["gpt2", "llama", "qwen2", "gemma2", "granite", "cohere", "phi", "opt-projected"],
)
def test_rows_through_the_stored_head_are_the_models_own_logits(
    family: str, plan: Plan, tmp_path: Path
) -> None:
    """Tied heads, a bias, soft cap, scales and a projection before the head."""
    model: Any = build(family)
    job = make_job(plan, tmp_path / "cache", model)
    make(job)
    teacher = read(job)
    head = teacher.unembedding()
    for member, (prompt, response) in enumerate(LENGTHS):
        final = teacher.rows([member]).final
        logits = final @ head.head_VD.T + (0 if head.bias_V is None else head.bias_V)
        if head.transform is not None:
            logits = head.transform(logits)
        sample = job.data.train[member]
        ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
        with torch.no_grad():
            expected = model(ids).logits[0, max(prompt - 1, 0) : prompt + response - 1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (head.bias_V is not None) == (family == "phi")
    assert (head.transform is not None) == (family in ("gemma2", "granite", "cohere"))


def test_layers_are_the_normed_outputs_of_their_blocks(plan: Plan, tmp_path: Path) -> None:
    model: Any = build("llama")
    job = make_job(plan, tmp_path / "cache", model)
    make(job)
    sample = job.data.train[5]
    ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        first = model.model.norm(hidden[1])[0, 9 - 1 : -1]
    rows = read(job).rows([5])
    torch.testing.assert_close(rows.layers[0], first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.layers[1], rows.final)  # block 3 is the last
    assert torch.equal(read(job, [3]).rows([5]).layers[0], rows.layers[1])  # fewer layers
    assert read(job, []).rows([5]).layers == []


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_in_any_order_get_the_rows_of_the_teacher(
    family: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_teacher, "SHARD_BYTES", 5000)
    job = make_job(plan, tmp_path / "cache", build(family))
    make(job)
    assert len(job.shards) > 2
    teacher, generator = read(job), random.Random(0)
    for size in (1, 2, 3, 7, 10):
        members = generator.sample(range(10), size)
        assert any(response_rows(job.data.train)[members])
        torch.testing.assert_close(
            cached(teacher, members), online(job, members), rtol=1e-5, atol=2e-6
        )
    assert teacher.rows([3]).final.shape == (0, 16)  # no prompt, one token: nothing to predict it
    assert all(rows.is_contiguous() for rows in teacher.rows([1, 0]).layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 32])
def test_the_same_batch_gives_the_same_bits(
    bits: int, dtype: torch.dtype, plan: Plan, tmp_path: Path
) -> None:
    """One batch of all records, by length: no other rounding than that of the storage."""
    optim = dataclasses.replace(plan.config.optim, micro_batch_size=100)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, optim=optim))
    model: Any = build("gpt2").to(dtype)  # type: ignore[arg-type]
    job = make_job(plan, tmp_path / "cache", model, bits=bits)
    make(job)
    lengths = np.array([sum(sizes) for sizes in LENGTHS])
    (members,) = length_batches(lengths, 100 * 32)
    stored_dtype = torch.float32 if bits == 32 else torch.bfloat16
    actual, expected = cached(read(job), members), online(job, members)
    assert actual.dtype == stored_dtype and torch.equal(actual, expected.to(stored_dtype))
    manifest = read_manifest(job.folder)
    assert manifest is not None
    exact = bits == 32 or dtype == torch.bfloat16
    assert all((error == 0) == exact for error in manifest["relative_error"].values())
    assert read(job).unembedding().head_VD.dtype == dtype


def test_8_bits_come_back_in_bfloat16_with_the_error_that_is_told(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_teacher, "SHARD_BYTES", 1000)
    job = make_job(plan, tmp_path / "cache", build("llama"), bits=8)
    make(job)
    actual, expected = cached(read(job), list(range(10))), online(job, list(range(10)))
    assert actual.dtype == torch.bfloat16
    errors = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).mean(dim=-1)
    assert ((errors > 0.005) & (errors < 0.04)).all()
    manifest = read_manifest(job.folder)
    assert manifest is not None and list(manifest["relative_error"]) == ["final", "L01", "L03"]
    told = torch.tensor(list(manifest["relative_error"].values()))
    torch.testing.assert_close(errors, told, rtol=1e-3, atol=0)


def test_opening_reads_no_rows(plan: Plan, tmp_path: Path) -> None:
    """What changes in the file after opening is seen: rows are read when they are asked for."""
    job = make_job(plan, tmp_path / "cache", build("gpt2"))
    make(job)
    teacher = read(job)
    path = shard_path(job.folder, job.shards[0])
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(1234.5).tobytes())
    last = teacher.rows([9])
    assert last.layers[-1][-1, -1] == 1234.5


# --- What is refused ----------------------------------------------------------------------------


KEY = {"teacher": "a" * 64, "teacher_layers": [2, 4], "bits": 16, "data": "b" * 64}


@pytest.mark.parametrize(
    ("part", "value"),
    [("teacher", "c" * 64), ("teacher_layers", [2, 3]), ("bits", 8), ("data", "d"), ("new", 1)],
)
def test_each_part_that_differs_is_named_with_both_values(part: str, value: Any) -> None:
    check_same_key(Path("x"), KEY, dict(KEY))
    with pytest.raises(ConfigError) as caught:
        check_same_key(Path("x"), KEY, {**KEY, part: value})
    assert f"{part} {str(KEY.get(part))[:12]}" in caught.value.what
    assert f"this run has {str(value)[:12]}" in caught.value.what
    assert caught.value.what.count("this run has") == 1


def test_fewer_layers_are_served_but_not_mixed_in() -> None:
    fewer = {**KEY, "teacher_layers": [4]}
    check_same_key(Path("x"), KEY, fewer)
    with pytest.raises(ConfigError, match=r"teacher_layers \[2, 4\], this run has \[4\]"):
        check_same_key(Path("x"), KEY, fewer, exact=True)
    with pytest.raises(ConfigError, match="teacher_layers"):
        check_same_key(Path("x"), fewer, KEY)


@pytest.mark.parametrize("damage", ["gone", "short", "other records", "no file"])
def test_a_damaged_shard_is_named_and_made_again(
    damage: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_teacher, "SHARD_BYTES", 5000)
    job = make_job(plan, tmp_path / "cache", build("gpt2"))
    make(job)
    path = shard_path(job.folder, job.shards[1])
    content = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(content[:-1])
    elif damage == "other records":
        path.write_bytes((shard_path(job.folder, job.shards[0])).read_bytes())
    elif damage == "no file":
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"rows-00001\.safetensors is damaged"):
        read(job)
    missing = missing_shards(job.folder, job.shards, job.key)
    assert missing == [job.shards[1]]
    make(dataclasses.replace(job, missing=missing))
    assert path.read_bytes() == content


def test_a_missing_head_is_named(plan: Plan, tmp_path: Path) -> None:
    job = make_job(plan, tmp_path / "cache", build("gpt2"))
    make(job)
    (job.folder / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"head\.safetensors"):
        read(job).unembedding()


def test_other_numbers_of_rows_are_refused(plan: Plan, tmp_path: Path) -> None:
    job = make_job(plan, tmp_path / "cache", build("gpt2"))
    make(job)
    counts = job.row_counts.copy()
    counts[2] += 1
    with pytest.raises(CheckpointError, match="not those of the records"):
        read(dataclasses.replace(job, row_counts=counts))
