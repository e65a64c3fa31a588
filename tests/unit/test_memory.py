"""The memory estimate: its parts against hand counts, real tensors and a measured run."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, Workspace
from model_zoo import BLOCKS, Size, build
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from distilllens.config import load_config
from distilllens.lens import LogitLens
from distilllens.models import add_lora
from distilllens.student import lens_rows
from distilllens.training.dry_step import (
    BatchShape,
    LiveBytes,
    build_shape,
    build_student_shape,
    count_student,
    count_teacher,
)
from distilllens.training.memory import (
    KEPT_FREE,
    MALLOC_VARIABLE,
    at_stage,
    count_parameters,
    count_run,
    estimate_memory,
    estimate_state_bytes,
    longest_batch,
)
from distilllens.training.memory_tables import stages_table
from distilllens.training.setup import Plan, plan_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH = BatchShape(records=2, length=64, rows=50)

LLAMA_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
)
TINYLLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
)


@pytest.fixture
def plan(workspace: Workspace) -> Callable[..., Plan]:
    """Factory of plans over tiny models; flags are added."""

    def build(*flags: str) -> Plan:
        return plan_run(load_config(workspace.flags(*flags)))

    return build


@pytest.fixture(autouse=True)
def exact_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MALLOC_VARIABLE, "1000000")


# --- Counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "published"),
    [(GPT2Config(), 124_439_808), (LLAMA_7B, 6_738_415_616), (TINYLLAMA, 1_100_048_384)],
)
def test_parameters_are_those_of_the_published_models(
    config: PretrainedConfig, published: int
) -> None:
    assert count_parameters(config) == published


def test_live_bytes_are_those_of_the_tensors_that_are_left() -> None:
    live = LiveBytes()
    with live:
        a = torch.empty(10, device="meta")
        b = a * 2
        view = b[2:]
        assert live.now == 80
        del a, b
        assert live.now == 40, "the view holds its tensor"
        del view
    assert (live.now, live.peak) == (0, 80)


def test_a_mlp_keeps_input_and_output_of_its_activation() -> None:
    with torch.device("meta"):
        mlp = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
        rows = torch.empty(8, 4)
    live = LiveBytes()
    live.leave_out(mlp)
    with live:
        output = mlp(rows)
    assert live.now == 4 * 8 * (16 + 16 + 4)
    assert output.shape == (8, 4)


def saved_bytes(model: PreTrainedModel, batch: BatchShape) -> int:
    """What autograd really keeps of a body's forward pass, weights left out."""
    ours = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in ours:
            kept.setdefault(address, tensor)
        return tensor

    ids = torch.zeros(batch.records, batch.length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = lens_rows(LogitLens(model), [], ids, torch.zeros(batch.rows, dtype=torch.int64))
    assert output.final.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activations_are_what_autograd_keeps(
    family: str,
    dropout: float,
    attention: str,
    dtype: torch.dtype,
    plan: Callable[..., Plan],
    tiny_gpt2: Callable[..., PreTrainedModel],
    tiny_llama: Callable[..., PreTrainedModel],
) -> None:
    model = (tiny_gpt2 if family == "gpt2" else tiny_llama)(n_layer=4)
    dropouts = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout")
    model.config.update({n: dropout for n in dropouts if hasattr(model.config, n)})
    model = type(model)._from_config(model.config, dtype=dtype, attn_implementation=attention)
    real = saved_bytes(model.train(), BATCH)
    flags = ("--objective.approach", "sft", "--model.attention", attention)
    shape = dataclasses.replace(plan(*flags), student_config=model.config, dtype=dtype)
    counted = count_student(shape, build_student_shape(shape), BATCH, CPU)
    assert counted.kept == pytest.approx(real, rel=0.06)


def test_values_of_another_width_than_keys(plan: Callable[..., Plan]) -> None:
    model = build("minicpm3", Size(vocab=300, width=32))
    heads = model.config.qk_nope_head_dim + model.config.qk_rope_head_dim
    assert heads != model.config.v_head_dim
    shape = dataclasses.replace(
        plan("--objective.approach", "sft"), student_config=model.config, dtype=torch.float32
    )
    counted = count_student(shape, build_student_shape(shape), BATCH, CPU).kept
    assert counted == pytest.approx(saved_bytes(model.train(), BATCH), rel=0.06)
    scores = 4 * BATCH.records * model.config.num_attention_heads * BATCH.length**2
    on_gpu = count_student(shape, build_student_shape(shape), BATCH, CUDA).kept
    assert counted - on_gpu > BLOCKS * scores / 2, "its kernels know such values"


def test_gradient_checkpointing_keeps_the_inputs_of_the_blocks(plan: Callable[..., Plan]) -> None:
    few = plan("--objective.approach", "sft", "--model.gradient_checkpointing", "true")
    step = count_student(few, build_student_shape(few), BATCH, CPU)
    all_of_it = plan("--objective.approach", "sft")
    full = count_student(all_of_it, build_student_shape(all_of_it), BATCH, CPU)
    unit = 4 * BATCH.records * BATCH.length * few.student_config.hidden_size
    assert 3 * unit <= step.kept < 8 * unit < full.kept / 4
    assert step.kept < step.backward < full.backward


def test_a_gpu_keeps_no_attention_scores(plan: Callable[..., Plan]) -> None:
    shape = plan("--objective.approach", "sft")
    shape.student_config.update({"attn_pdrop": 0.1})
    student = build_student_shape(shape)
    long = BatchShape(records=1, length=128, rows=10)
    scores = 4 * shape.student_config.n_head * long.length**2
    on_cpu = count_student(shape, student, long, CPU).kept
    on_gpu = count_student(shape, build_student_shape(shape), long, CUDA).kept
    assert on_cpu - on_gpu > 3 * 3 * scores, "three blocks, three matrices each"


def test_the_teacher_needs_room_for_one_block_and_its_rows(plan: Callable[..., Plan]) -> None:
    shape = plan()
    assert shape.teacher_config is not None
    unit = 4 * BATCH.records * BATCH.length * shape.teacher_config.hidden_size
    shape.teacher_config.update({"n_layer": 60})  # ten times as many blocks
    deep = count_teacher(shape, BATCH, CPU)
    shape.teacher_config.update({"n_layer": 6})
    assert deep == count_teacher(shape, BATCH, CPU)
    assert 4 * unit < deep < 30 * unit


def test_an_end_token_for_padding_does_not_disturb() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, pad_token_id=0)
    model = build_shape(config, torch.float32, "auto")
    model.get_decoder()(input_ids=torch.empty(1, 4, dtype=torch.int64, device="meta"))
    assert config.pad_token_id == 0, "the caller's configuration is untouched"


# --- LoRA ---------------------------------------------------------------------------------------


def test_an_adapter_trains_rank_times_in_and_out_of_each_matrix(
    plan: Callable[..., Plan], tiny_llama: Callable[..., PreTrainedModel]
) -> None:
    config = tiny_llama().config  # width 32, inner width 64, half as many key and value heads
    shape = dataclasses.replace(plan("--model.student_lora.r", "4"), student_config=config)
    counts = count_run(shape, BATCH, CPU)
    attention = (32 + 32) + (32 + 16) + (32 + 16) + (32 + 32)
    assert counts.trained == 3 * 4 * (attention + 3 * (32 + 64))
    assert counts.parameters == count_parameters(config) + counts.trained
    lora = shape.config.model.student_lora
    assert lora is not None
    real = add_lora(tiny_llama(), lora)
    assert counts.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    disk, model = estimate_state_bytes(shape)
    assert disk == 2 * model + counts.trained * 12


# --- DeepSpeed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "bytes_each"), [(0, 8), (1, 12), (2, 12), (3, 12)])
def test_optimizer_bytes(stage: int, bytes_each: int, plan: Callable[..., Plan]) -> None:
    """Two float32 moments; from stage 1 on also DeepSpeed's float32 weights, shared out."""
    shape = at_stage(plan(), stage)
    counts = count_run(shape, BATCH, CPU)
    for world_size in (1, 4):
        share = world_size if stage else 1
        found = estimate_memory(shape, world_size, counts=counts, device=CPU).device["optimizer"]
        assert found * 1e9 == pytest.approx(bytes_each * counts.trained / share)


def test_weights_are_shared_out_in_stage_3_only(plan: Callable[..., Plan]) -> None:
    counts = count_run(plan(), BATCH, CPU)
    for stage in range(4):
        parts = estimate_memory(at_stage(plan(), stage), 4, counts=counts, device=CPU).device
        share = 4 if stage == 3 else 1
        assert parts["student weights"] * 1e9 == pytest.approx(4 * counts.parameters / share)
        assert parts["teacher weights"] * 1e9 == pytest.approx(
            counts.teacher_weights + counts.teacher_body
        )


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_more_processes_never_need_more(
    device: torch.device, checkpointing: str, plan: Callable[..., Plan]
) -> None:
    shape = plan("--model.gradient_checkpointing", checkpointing)
    counts = count_run(shape, BATCH, device)
    for stage in range(4):
        totals = [
            estimate_memory(at_stage(shape, stage), size, counts=counts, device=device).total
            for size in (1, 2, 4, 8, 32)
        ]
        assert totals == sorted(totals, reverse=True), stage


def large(shape: Plan) -> Plan:
    config = GPT2Config(n_layer=3, n_embd=512, n_head=8)
    return dataclasses.replace(shape, student_config=config)


def test_higher_stages_need_less_on_many_gpus_where_weights_weigh(
    plan: Callable[..., Plan],
) -> None:
    shape = large(plan("--objective.approach", "sft"))
    counts = count_run(shape, BATCH, CUDA)
    counts = dataclasses.replace(counts, parameters=10**10, trained=10**10)
    totals = [
        estimate_memory(at_stage(shape, stage), 32, counts=counts, device=CUDA).total
        for stage in range(4)
    ]
    assert totals == sorted(totals, reverse=True)


def test_offloading_moves_the_optimizer_to_main_memory(plan: Callable[..., Plan]) -> None:
    shape = at_stage(plan(), 2)
    counts = count_run(shape, BATCH, CUDA)
    before = estimate_memory(shape, 4, counts=counts, device=CUDA)
    zero = shape.deepspeed["zero_optimization"] | {"offload_optimizer": {"device": "cpu"}}
    away = dataclasses.replace(shape, deepspeed={**shape.deepspeed, "zero_optimization": zero})
    after = estimate_memory(away, 4, counts=counts, device=CUDA)
    assert "optimizer" not in after.device
    assert after.host["optimizer"] * 1e9 == pytest.approx(12 * counts.trained / 4)
    assert after.total < before.total
    on_cpu = estimate_memory(away, 4, counts=counts, device=CPU)
    assert on_cpu.host == {}
    assert on_cpu.device["optimizer"] == after.host["optimizer"]


def test_malloc_keeps_what_is_freed_unless_told_otherwise(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_run(plan(), BATCH, CPU)
    exact = estimate_memory(plan(), 1, counts=counts, device=CPU)
    monkeypatch.delenv(MALLOC_VARIABLE)
    default = estimate_memory(plan(), 1, counts=counts, device=CPU)
    assert KEPT_FREE not in exact.device
    assert (KEPT_FREE in default.device) == (sys.platform == "linux")


# --- The longest batch, and the screen ----------------------------------------------------------


def test_the_longest_batch_is_that_of_the_data_if_it_is_known(plan: Callable[..., Plan]) -> None:
    shape = plan("--optim.micro_batch_size", "2", "--data.max_length", "300")
    assert longest_batch(shape) == BatchShape(records=2, length=300, rows=600)
    found = longest_batch(shape, lengths=[9, 7, 8], rows=[2, 5, 3])
    assert found == BatchShape(records=2, length=9, rows=8)


@pytest.mark.parametrize(
    ("lengths", "records", "length"),
    [
        ([150, 20, 150, 150, 150], 1, 600),  # more than 512, but not enough for two rows
        ([400, 300, 200, 124], 2, 524),  # 1,024 tokens: 400 with 124, 300 with 200
    ],
)
def test_the_longest_batch_of_packed_records_holds_their_tokens(
    lengths: list[int], records: int, length: int, plan: Callable[..., Plan]
) -> None:
    flags = ("--optim.micro_batch_size", "4", "--data.max_length", "512", "--data.packing", "true")
    found = longest_batch(plan(*flags), lengths=lengths, rows=[2] * len(lengths))
    assert found == BatchShape(records=records, length=length, rows=8)
    assert longest_batch(plan(*flags)) == BatchShape(records=4, length=512, rows=2048)


def rows_of(table: Table) -> dict[str, list[str]]:
    """Returns the cells of each row of a table by its name, as they stand in 80 columns."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    lines = [line for line in capture.get().splitlines() if line[:1] in ("│", "┃")]
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]
    return {name: figures for name, *figures in cells}


def in_gb(text: str) -> float:
    """Reads 1.23 GB or 4.5 MB."""
    number, unit = text.split()
    return float(number) * {"GB": 1, "MB": 1e-3}[unit]


def test_other_stages_are_told_and_the_own_is_marked(
    plan: Callable[..., Plan], workspace: Workspace
) -> None:
    counts = count_run(plan(), BATCH, CPU)
    table = rows_of(stages_table(plan(), 2, counts, CPU))
    assert table.pop("for") == ["0", "1, this file", "2", "3"]
    for stage in range(4):
        column = {name: cells[stage] for name, cells in table.items()}
        assert column.pop("in main memory") == ""
        total = in_gb(column.pop("total"))
        logits = in_gb(column["logits"].strip("()"))
        assert logits == pytest.approx(counts.step.loss / 1e9, rel=0.05)
        parts = [in_gb(c) for c in column.values() if c and not c.startswith("(")]
        assert sum(parts) == pytest.approx(total, abs=0.01)
    bf16 = plan("--deepspeed", workspace.deepspeed(2, "bf16"))
    head = rows_of(stages_table(bf16, 2, counts, CPU))["for"]
    assert head == ["1", "2, this file", "3"], "bf16 needs stage 1 or more"


# --- A measured run -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident-set mark of Linux")
def test_the_estimate_is_within_15_percent_of_a_measured_run(tmp_path: Path) -> None:
    found = tmp_path / "found.csv"
    case = "zero1-fp32-kd-2x512-ckpt"
    command = [sys.executable, "-m", "benchmarks.memory", "--shape", "small", "--cases", case]
    subprocess.run([*command, "--csv", str(found)], cwd=PROJECT, check=True, timeout=300)
    with found.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["ratio"]) == pytest.approx(1, abs=0.15)
    runtime = json.loads(row["parts"])["runtime"]
    needed = float(row["estimate_gb"]) - runtime
    assert needed == pytest.approx(float(row["measured_gb"]) - runtime, rel=0.35)


IN_BLOCKS = 6 * (12 * 48**2 + 13 * 48)
"""Weights of the blocks of the workspace's teacher: GPT-2 of width 48."""
TIED, POSITIONS = 300 * 48 + 2 * 48, 128 * 48
"""Of its head, which is its embedding, with the final norm; and of its position embedding."""


@pytest.mark.parametrize(
    ("option", "value", "on_device", "beside"),
    [
        ("placement", "device", 4 * (TIED + POSITIONS + IN_BLOCKS), 0),
        ("placement", "sharded", 4 * TIED + (POSITIONS + IN_BLOCKS), 0),
        ("placement", "cpu", 4 * TIED, POSITIONS + IN_BLOCKS),
        ("quantization", "8bit", 4 * (TIED + POSITIONS) + IN_BLOCKS, 0),
        ("quantization", "4bit", 4 * (TIED + POSITIONS) + 0.5625 * IN_BLOCKS, 0),
    ],
)
def test_a_teacher_in_four_parts_or_in_few_bits(
    option: str, value: str, on_device: float, beside: float, plan: Callable[..., Plan]
) -> None:
    shape = plan(f"--model.teacher_{option}", value)
    found = estimate_memory(shape, 4, counts=count_run(shape, BATCH, CUDA), device=CUDA)
    assert found.device["teacher weights"] * 1e9 == pytest.approx(on_device)
    assert found.host.get("teacher weights", 0) * 1e9 == pytest.approx(beside)


@pytest.mark.parametrize("placement", ["sharded", "cpu"])
def test_an_untied_embedding_is_divided_too(
    placement: str, plan: Callable[..., Plan], tiny_llama: Callable[..., PreTrainedModel]
) -> None:
    teacher = tiny_llama(n_layer=4, n_embd=32)
    shape = plan("--model.teacher_placement", placement)
    shape = dataclasses.replace(shape, teacher_config=teacher.config)
    found = estimate_memory(shape, 4, counts=count_run(shape, BATCH, CUDA), device=CUDA)
    whole = 300 * 32 + 32  # head and final norm
    part = (sum(p.numel() for p in teacher.parameters()) - whole) / 4
    on_device, beside = (whole + part, 0) if placement == "sharded" else (whole, part)
    assert found.device["teacher weights"] * 1e9 == pytest.approx(4 * on_device)
    assert found.host.get("teacher weights", 0) * 1e9 == pytest.approx(4 * beside)


def test_loading_is_a_moment_of_stage_3(plan: Callable[..., Plan]) -> None:
    """One weight is whole on the device, or all where layer pairs are measured; no optimizer."""
    shape = at_stage(plan(), 3)
    counts = dataclasses.replace(count_run(shape, BATCH, CUDA), largest=10**10)
    found = estimate_memory(shape, 4, counts=counts, device=CUDA)
    assert found.moment == "loading" and "optimizer" not in found.device
    assert found.device["weights to divide"] == pytest.approx(4 * 10)
    assert found.device["student weights"] * 1e9 == pytest.approx(4 * counts.parameters / 4)
    open_ = at_stage(plan("--objective.lens.rule", "lens_similarity"), 3)
    counts = dataclasses.replace(counts, parameters=2 * 10**10, largest=10**6, trained=10**6)
    assert estimate_memory(shape, 32, counts=counts, device=CUDA).total < 10
    found = estimate_memory(open_, 32, counts=counts, device=CUDA)
    assert found.moment == "loading" and found.device["student weights"] == pytest.approx(80)


def test_a_divided_student_is_whole_in_main_memory_first(plan: Callable[..., Plan]) -> None:
    path = PROJECT / "configs" / "deepspeed" / "zero3_offload_params_fp32.json"
    shape = plan("--deepspeed", str(path), "--model.student_lora.r", "2")
    counts = dataclasses.replace(count_run(shape, BATCH, CUDA), parameters=10**10)
    host = estimate_memory(shape, 4, counts=counts, device=CUDA).host
    assert host["student weights"] == pytest.approx(10)
    assert sum(host.values()) - host["runtime"] == pytest.approx(40 + 10)


def test_projectors_are_trained_too(plan: Callable[..., Plan]) -> None:
    shape = plan("--objective.approach", "kd", "--objective.hidden.coeff", "1")
    pairs, widths = len(shape.pairs), (24, 48)  # of the workspace's student and teacher
    assert pairs > 0
    more = count_run(shape, BATCH, CPU).trained - count_run(plan(), BATCH, CPU).trained
    assert more == pairs * widths[0] * widths[1]
