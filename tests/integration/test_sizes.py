"""Models that need more memory than one device has: ZeRO files, float16, other teachers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, Workspace, stop_at
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from distilllens import families
from distilllens.kernels.chunks import LogitTransform
from distilllens.runtime.faults import VARIABLE
from distilllens.trainer import Trainer
from train import main

WORKER = Path(__file__).with_name("sizes_worker.py")
SHORT = ("--optim.max_steps", "3", "--tracking.log_every", "1", "--optim.micro_batch_size", "4")


@pytest.fixture
def wide(workspace: Workspace) -> Workspace:
    """The workspace with a teacher that has something to say, and matrices worth dividing."""
    torch.manual_seed(1)
    config = GPT2Config.from_pretrained(workspace.root / "teacher")
    config.update({"n_layer": 4, "n_embd": 128, "n_head": 2, "initializer_range": 0.1})
    GPT2LMHeadModel(config).save_pretrained(workspace.root / "teacher")
    return workspace


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "train/loss" in line]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in lines(run)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}


def update_error(run: Path, other: Path, start: Path) -> float:
    """Returns ‖update of run − update of other‖ / ‖update of other‖ over all weights."""
    before, one, two = weights(start), weights(run / "latest"), weights(other / "latest")
    assert before.keys() == one.keys() == two.keys()
    difference = sum(float((one[n] - two[n]).square().sum()) for n in before)
    return (difference / sum(float((two[n] - before[n]).square().sum()) for n in before)) ** 0.5


# --- Two processes ------------------------------------------------------------------------------

SAME_RUN = {
    # name: (flags, largest relative difference of a loss and of the update from zero1_fp32)
    "zero0_fp32": ((), 1e-6, 1e-4),
    "zero2_fp32": ((), 1e-6, 1e-4),
    "zero3_fp32": ((), 1e-6, 1e-4),
    "zero2_offload_fp32": ((), 1e-6, 1e-4),
    "zero3_offload_fp32": ((), 1e-6, 1e-4),
    "zero3_offload_params_fp32": ((), 1e-6, 1e-4),
    "zero1_bf16": (("--model.teacher_dtype", "float32"), 5e-3, 0.15),
    "zero1_fp16": (("--model.teacher_dtype", "float32"), 1e-3, 0.05),
    "sharded": (("--model.teacher_placement", "sharded"), 1e-6, 1e-4),
    "cpu": (("--model.teacher_placement", "cpu"), 1e-6, 1e-4),
    "sharded_bf16": (
        ("--model.teacher_placement", "sharded", "--model.teacher_dtype", "bfloat16"),
        5e-3,
        0.15,
    ),
}

SAME_IN_16_BITS = {
    # name: largest relative difference of the update from zero1 in the same precision
    "zero2_bf16": 1e-6,
    "zero3_bf16": 0.03,
    "zero2_offload_bf16": 1e-6,
    "zero3_offload_bf16": 0.03,
    "zero3_offload_params_bf16": 0.03,
    "zero2_fp16": 1e-6,
    "zero3_fp16": 0.03,
    "zero2_offload_fp16": 1e-6,
    "zero3_offload_fp16": 0.03,
    "zero3_offload_params_fp16": 0.03,
}


def do_jobs(workspace: Workspace, jobs: list[list[str]]) -> list[list[dict[str, Any]]]:
    """Has two processes train by each of several command lines; returns both ranks' outcomes."""
    jobs_file = workspace.root / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {name: value for name, value in os.environ.items() if name not in group}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(jobs_file)],
        env={**own, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((workspace.root / f"outcomes-{r}.json").read_text()) for r in (0, 1)]


@pytest.mark.slow
def test_two_processes_by_every_file_and_placement(wide: Workspace) -> None:
    jobs = [wide.flags(*SHORT, out="zero1_fp32")]
    for name, (flags, _, _) in SAME_RUN.items():
        file = name if name.startswith("zero") else "zero1_fp32"
        path = str(PROJECT / "configs" / "deepspeed" / f"{file}.json")
        jobs.append(wide.flags(*SHORT, *flags, "--deepspeed", path, out=name))
    for name in SAME_IN_16_BITS:
        path = str(PROJECT / "configs" / "deepspeed" / f"{name}.json")
        flags = (*SHORT, "--model.teacher_dtype", "float32", "--deepspeed", path)
        jobs.append(wide.flags(*flags, out=name))
    ranks = zip(*do_jobs(wide, jobs), strict=True)
    outcomes = dict(zip(["zero1_fp32", *SAME_RUN, *SAME_IN_16_BITS], ranks, strict=True))
    one, student = wide.root / "zero1_fp32", wide.root / "student"
    start = losses(one)[0]
    assert losses(one)[-1] < 0.99 * start  # so much happens that a wrong loss would show
    for name, (_, most_loss, most_update) in SAME_RUN.items():
        assert [outcome["code"] for outcome in outcomes[name]] == [0, 0], name
        assert losses(wide.root / name) == pytest.approx(losses(one), rel=most_loss), name
        assert update_error(wide.root / name, one, student) < most_update, name
    for name, most_update in SAME_IN_16_BITS.items():
        same = wide.root / f"zero1_{name.rpartition('_')[2]}"
        assert [outcome["code"] for outcome in outcomes[name]] == [0, 0], name
        assert losses(wide.root / name) == pytest.approx(losses(same), rel=1e-3), name
        assert update_error(wide.root / name, same, student) < most_update, name
    teacher = GPT2LMHeadModel.from_pretrained(wide.root / "teacher")
    head = teacher.lm_head.weight.numel()  # tied: it is a part of the body too
    body = sum(p.numel() for p in teacher.parameters()) - head
    for name, size in (("sharded", 4), ("cpu", 4), ("sharded_bf16", 2)):
        for outcome in outcomes[name]:
            held = outcome["teacher"]
            assert held["head"] == size * head, name
            assert 0.5 * body < held["body"] / size - head < 0.52 * body, name


@pytest.mark.parametrize("name", ["zero2_offload_fp32", "zero3_offload_params_fp32"])
def test_offloaded_states_come_back(wide: Workspace, name: str) -> None:
    """With another placement of the teacher, which is no part of the state."""
    flags = (*SHORT, "--deepspeed", str(PROJECT / "configs" / "deepspeed" / f"{name}.json"))
    assert main(wide.flags(*flags, out="straight")) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch)
        assert main(wide.flags(*flags)) == 143
    assert main(wide.flags(*flags, "--model.teacher_placement", "cpu")) == 0
    assert losses(wide.root / "run") == losses(wide.root / "straight")
    straight, resumed = (weights(wide.root / out / "latest") for out in ("straight", "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# --- A student larger than a device -------------------------------------------------------------


@pytest.mark.parametrize("lora", [(), ("--model.student_lora.r", "4")])
@pytest.mark.parametrize("file", ["zero3_bf16", "zero3_offload_params_bf16"])
def test_stage_3_never_moves_the_whole_student(
    workspace: Workspace, file: str, lora: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed too moves what it is given, if that is not divided before."""
    moved: list[int] = []
    to = nn.Module.to

    def count_and_move(module: nn.Module, *place: Any, **more: Any) -> nn.Module:
        moved.append(sum(p.numel() for p in module.parameters() if not p.is_meta))
        return to(module, *place, **more)

    monkeypatch.setattr(nn.Module, "to", count_and_move)
    largest = {}
    for name in ("zero1_bf16", file):
        path = str(PROJECT / "configs" / "deepspeed" / f"{name}.json")
        alone = ("--objective.approach", "sft", "--deepspeed", path)
        moved.clear()
        assert main(workspace.flags(*SHORT, *alone, *lora, out=name)) == 0
        largest[name] = max(moved)
    student = GPT2LMHeadModel.from_pretrained(workspace.root / "student")
    assert largest["zero1_bf16"] >= sum(p.numel() for p in student.parameters())
    assert largest[file] < 4 * 4 * 24 + 1, "peft's own moves, of one matrix of an adapter"
    one, three = (losses(workspace.root / name) for name in largest)
    assert three == pytest.approx(one, rel=1e-3)


def test_the_lens_of_a_divided_student_is_proved_too(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = LogitTransform(scale=2.0, softcap=None)
    monkeypatch.setattr(families, "_logit_transform", lambda _: wrong)
    flags = ("--objective.approach", "sft", "--deepspeed", workspace.deepspeed(3))
    assert main(workspace.flags(*SHORT, *flags)) == 2
    assert "the logit lens of family 'gpt2' differs" in capsys.readouterr().err


# --- float16 ------------------------------------------------------------------------------------


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets DeepSpeed train in float16 on a CPU: slow, which is why it refuses, but right."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)


def fp16_file(folder: Path, *, stage: int = 1, **settings: float) -> str:
    content = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True, **settings}}
    path = folder / "fp16.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.skipif(get_accelerator().is_fp16_supported(), reason="this device has float16")
def test_float16_is_refused_where_there_is_none(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(workspace.flags("--deepspeed", workspace.deepspeed(1, "fp16"))) == 2
    assert "float16 does not run on this cpu" in capsys.readouterr().err


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("stage", [1, 3])
def test_float16_trains_as_float32(wide: Workspace, stage: int) -> None:
    for precision in ("fp32", "fp16"):
        file = ("--deepspeed", wide.deepspeed(stage, precision))
        more = ("--model.teacher_dtype", "float32", "--optim.max_steps", "6")
        assert main(wide.flags(*SHORT, *file, *more, out=precision)) == 0
    assert losses(wide.root / "fp16") == pytest.approx(losses(wide.root / "fp32"), rel=1e-3)
    assert update_error(wide.root / "fp16", wide.root / "fp32", wide.root / "student") < 0.05
    last = lines(wide.root / "fp16")[-1]
    assert (last["train/loss_scale"], last["train/skipped_steps"]) == (2.0**16, 0)
    exported = load_file(wide.root / "fp16/best/model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float16}


@pytest.mark.usefixtures("float16")
def test_the_scale_keeps_small_gradients(wide: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of this loss are below 1e-6, where float16 has next to nothing."""
    small = (
        *("--objective.divergence", "fkl+rkl", "--objective.lens.coeff", "0"),
        *("--objective.fkl_coeff", "3e-5", "--objective.rkl_coeff", "3e-5"),
    )
    for precision in ("fp32", "fp16"):
        file = ("--deepspeed", wide.deepspeed(1, precision))
        assert main(wide.flags(*SHORT, *small, *file, out=precision)) == 0
    one, start = wide.root / "fp32", wide.root / "student"
    assert update_error(wide.root / "fp16", one, start) < 0.05
    monkeypatch.setattr(Trainer, "loss_scale", 1.0)  # then it is applied after the loss alone
    file = ("--deepspeed", wide.deepspeed(1, "fp16"))
    assert main(wide.flags(*SHORT, *small, *file, out="late")) == 0
    assert update_error(wide.root / "late", one, start) > 0.1


@pytest.mark.usefixtures("float16")
def test_skipped_steps_count_and_come_back(
    wide: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale begins far too high; a step that is skipped is a step of the schedule."""
    file = fp16_file(wide.root, initial_scale_power=24, hysteresis=1)
    flags = (*SHORT, "--optim.max_steps", "9", "--deepspeed", file)
    assert main(wide.flags(*flags, out="straight")) == 0
    told = lines(wide.root / "straight")
    skipped = [int(line["train/skipped_steps"]) for line in told]
    assert skipped[:2] == [1, 2] and 2 < skipped[-1] < 9
    assert [line["train/loss_scale"] for line in told] == [2.0 ** (24 - n) for n in skipped]
    shares = [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    rates = [1e-7 + share * (1e-3 - 1e-7) for share in shares]
    assert [line["train/lr"] for line in told] == pytest.approx(rates)
    for step in (2, 8):  # all skipped so far; some done
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            assert main(wide.flags(*flags)) == 143
    untouched = weights(wide.root / "run/state/step-2/student")
    for name, weight in weights(wide.root / "student").items():
        torch.testing.assert_close(untouched[name], weight, rtol=1e-3, atol=1e-6)  # rounded only
    assert main(wide.flags(*flags)) == 0
    assert losses(wide.root / "run") == losses(wide.root / "straight")
    straight, resumed = (weights(wide.root / name / "latest") for name in ("straight", "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.usefixtures("float16")
def test_an_overflow_at_the_smallest_scale_ends_the_run(
    wide: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    file = fp16_file(wide.root, initial_scale_power=24, hysteresis=1, min_loss_scale=2**22)
    assert main(wide.flags(*SHORT, "--deepspeed", file)) == 5
    error = capsys.readouterr().err
    assert "error[DL-NUMERICS]: gradients overflow float16 at step 3" in error
    assert "fix: a bf16 DeepSpeed file" in error and "kept: nothing was saved yet" in error


@pytest.mark.usefixtures("float16")
def test_a_non_finite_loss_is_told_as_such(
    wide: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "step.loss@2=NAN")
    for name, scale in (("room", 1), ("floor", 2**16)):  # left below the first scale, and none
        file = fp16_file(wide.root, hysteresis=1, min_loss_scale=scale)
        assert main(wide.flags(*SHORT, "--deepspeed", file, out=name)) == 5
        assert "non-finite loss at step 2 (loss=nan" in capsys.readouterr().err


# --- Other teachers -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_teacher_trains_nearly_the_same(wide: Workspace, bits: str) -> None:
    assert main(wide.flags(*SHORT, out="full")) == 0
    assert main(wide.flags(*SHORT, "--model.teacher_quantization", bits, out=bits)) == 0
    most = {"8bit": 0.03, "4bit": 0.3}[bits]
    assert losses(wide.root / bits) == pytest.approx(losses(wide.root / "full"), rel=most)
    assert losses(wide.root / bits) != losses(wide.root / "full")


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
def test_a_teacher_in_parts_in_other_families(
    workspace: Workspace, family: str, request: pytest.FixtureRequest
) -> None:
    """Rotary buffers, an untied and a tied head; also with one process, and with stage 3."""
    build = request.getfixturevalue(family)
    for name, size in (("teacher", 4), ("student", 3)):
        build(n_layer=size, n_embd=8 * size, n_head=2, seed=size).save_pretrained(
            workspace.root / name
        )
    for placement in ("device", "cpu"):
        flags = ("--model.teacher_placement", placement, "--data.packing", "true")
        stage = ("--deepspeed", workspace.deepspeed(3))
        assert main(workspace.flags(*SHORT, *flags, *stage, out=placement)) == 0
    whole, parts = (workspace.root / name for name in ("device", "cpu"))
    assert losses(whole) == losses(parts)
    saved = list((parts / "latest").glob("*.safetensors"))
    assert load_file(saved[0]).keys() == load_file(whole / "latest/model.safetensors").keys()
    assert AutoModelForCausalLM.from_pretrained(parts / "best") is not None
