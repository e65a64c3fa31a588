"""Rule lens_similarity: it finds the blocks a student was cut from, once, and on all processes."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace, stop_at
from rich.console import Console
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from distilllens.commands.make_student import build_student
from distilllens.config import load_config
from distilllens.errors import ConfigError, NumericsError
from distilllens.runtime.manifest import read_manifest
from distilllens.runtime.signals import Stopped, StopRequest
from distilllens.student import Teacher
from distilllens.training import layer_choice
from distilllens.training.layer_choice import measure_pairs, sample_batches
from distilllens.training.setup import build_module, build_teacher, load_data, plan_run
from train import main

BLOCKS = [1, 4, 5, 8]
"""Of the teacher, that the student is made of; `proportional` would pair with 2, 4, 6."""
RULE = ("--objective.lens.rule", "lens_similarity", "--objective.lens.count", "3")
CPU = torch.device("cpu")


@pytest.fixture
def cut_out(workspace: Workspace, tiny_gpt2: Callable[..., GPT2LMHeadModel]) -> Workspace:
    """A teacher of 8 blocks and its own blocks 1, 4, 5, 8 as student.

    The others hardly change the hidden state, so that student block k says what teacher block
    ``BLOCKS[k - 1]`` says; but they change it enough for that one to be nearer than its neighbours.
    """
    teacher = tiny_gpt2(n_layer=8, n_embd=48, n_head=2, seed=1)
    teacher.config.update({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.1})
    with torch.no_grad():
        teacher.transformer.wte.weight.mul_(12.0)  # the head's too: layers speak of other tokens
        for number, block in enumerate(teacher.transformer.h, start=1):
            factor = 60.0 if number in BLOCKS else 4.0
            for name in ("attn.c_proj.weight", "mlp.c_proj.weight"):
                block.get_parameter(name).mul_(factor)
    teacher.save_pretrained(workspace.root / "teacher")
    build_student(teacher, BLOCKS).save_pretrained(workspace.root / "student")
    return workspace


def layers(run: Path) -> list[dict[str, Any]]:
    content = json.loads((run / "layers.json").read_text())
    assert isinstance(content, list)
    return content


@pytest.mark.parametrize("kind", ["jsd", "fkl+rkl"])
def test_it_finds_the_blocks_the_student_is_made_of(
    cut_out: Workspace, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    flags = (*RULE, "--objective.lens.divergence", kind, "--optim.max_steps", "2")
    assert main(cut_out.flags(*flags)) == 0
    run = cut_out.root / "run"
    found = layers(run)
    assert [(pair["teacher"], pair["student"]) for pair in found] == [(1, 1), (4, 2), (5, 3)]
    assert [len(pair["divergence"]) for pair in found] == [8, 8, 8]
    assert found[0]["divergence"][0] == pytest.approx(0, abs=1e-5)  # the same weights so far
    for pair in found:
        assert pair["divergence"][pair["teacher"] - 1] == min(pair["divergence"])
    told = capsys.readouterr().out
    assert "teacher blocks for student blocks 1, 2, 3 are measured on 32 training records" in told
    assert told.index("are measured on") < told.index("(* chosen)") < told.index("step 2/2")
    assert f"* {found[1]['divergence'][3]:.4f}" in told
    assert "5 of 8" in told  # the table of pairs
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert f"train/lens/{kind}/L03" in last


def test_a_resumed_run_keeps_its_pairs(
    cut_out: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit, dropout included; measured on the first start alone."""
    flags = (*RULE, "--optim.max_steps", "6", "--tracking.log_every", "1")
    assert main(cut_out.flags(*flags, out="straight")) == 0
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert main(cut_out.flags(*flags)) == 143
    run, straight = cut_out.root / "run", cut_out.root / "straight"
    assert read_manifest(run / "state/step-3")["layer_pairs"] == layers(run) == layers(straight)
    (run / "layers.json").unlink()  # the state alone must do
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(layer_choice, "_measure", None)
        assert main(cut_out.flags(*flags)) == 0
    told = capsys.readouterr().out
    assert "(* chosen)" in told and "are measured on" not in told
    assert layers(run) == layers(straight)
    one, other = (load_file(r / "latest/model.safetensors") for r in (straight, run))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_count_on_the_way_is_measured_anew(
    cut_out: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert main(cut_out.flags(*RULE)) == 143
    flags = ("--objective.lens.count", "2")
    assert main(cut_out.flags(*RULE, *flags)) == 4
    assert main(cut_out.flags(*RULE, *flags, "--run.allow_changes", "true")) == 0
    assert [pair["student"] for pair in layers(cut_out.root / "run")] == [1, 3]


@pytest.mark.parametrize(
    ("zero", "flags"),
    [
        ((0, "fp32"), ()),
        ((3, "fp32"), ("--model.gradient_checkpointing", "true")),
        ((2, "bf16"), ("--data.packing", "true")),
        ((1, "fp32"), ("--model.student_lora.r", "2", "--objective.lens.norm", "none")),
    ],
)
def test_any_way_of_training(
    cut_out: Workspace, zero: tuple[int, str], flags: tuple[str, ...]
) -> None:
    flags = (*RULE, *flags, "--optim.max_steps", "1", "--deepspeed", cut_out.deepspeed(*zero))
    assert main(cut_out.flags(*flags)) == 0
    assert [pair["teacher"] for pair in layers(cut_out.root / "run")] == [1, 4, 5]


def test_the_last_teacher_block_is_not_chosen(
    cut_out: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final divergence compares it already."""
    divergences = np.full((3, 8), 0.5)
    divergences[2, 7] = 0.0
    monkeypatch.setattr(layer_choice, "_measure", lambda *_: divergences)
    assert main(cut_out.flags(*RULE, "--optim.max_steps", "1")) == 0
    assert [pair["teacher"] for pair in layers(cut_out.root / "run")] == [1, 2, 3]


def test_dry_run_says_when_the_pairs_are_known(
    cut_out: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*cut_out.flags(*RULE, "--objective.lens.sample", "7"), "--dry_run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "student blocks 1, 2, 3 are measured on 7 training records when the weights" in told
    assert "lens: layer pairs" not in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--model.teacher_cache", "cache"), "cannot be used with model.teacher_cache"),
        (("--model.teacher_placement", "cpu"), "needs model.teacher_placement=device, not cpu"),
        (("--objective.lens.count", "4"), r"lens.count=4 must be in \[1, 3\]"),
        (
            ("--objective.lens.teacher_layers", "[1]", "--objective.lens.student_layers", "[1]"),
            "lens.rule=lens_similarity, but objective.lens.teacher_layers",
        ),
        (("--objective.lens.weights", "[1, 2]"), "has 2 entries .* there are 3 pairs"),
    ],
)
def test_wrong_options_are_told_before_weights_are_loaded(
    cut_out: Workspace, flags: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        plan_run(load_config(cut_out.flags(*RULE, *flags)))


def test_without_the_lens_nothing_is_measured(cut_out: Workspace) -> None:
    flags = ("--objective.approach", "kd", "--optim.max_steps", "1")
    assert main(cut_out.flags(*RULE, *flags)) == 0
    assert not (cut_out.root / "run/layers.json").exists()


def test_the_sample_depends_on_the_seed_alone(cut_out: Workspace) -> None:
    def drawn(*flags: str) -> list[tuple[int, ...]]:
        plan = plan_run(load_config(cut_out.flags(*RULE, *flags)))
        batches = sample_batches(plan, load_data(plan))
        return sorted(
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            for ids, mask in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True)
        )

    sample = ("--objective.lens.sample", "9")
    first = drawn(*sample)
    assert len(first) == 9
    assert first == drawn(*sample, "--optim.micro_batch_size", "2")
    assert first != drawn(*sample, "--run.seed", "11")
    assert set(first) < set(drawn("--objective.lens.sample", "20"))
    assert len(drawn("--objective.lens.sample", "1000")) == 48  # all there are: 60 less 12


def test_logits_that_overflow_are_an_error(cut_out: Workspace) -> None:
    plan = plan_run(load_config(cut_out.flags(*RULE)))
    data = load_data(plan)
    teacher, head = build_teacher(plan, data, CPU)
    assert isinstance(teacher, Teacher)
    module = build_module(plan, data, CPU, head)
    module.student.get_submodule("transformer.h.1").register_forward_hook(
        lambda _, __, output: output + torch.inf
    )
    with pytest.raises(NumericsError, match="teacher block 1 and student block 2 is nan"):
        measure_pairs(plan, teacher, module, data, Console(quiet=True), StopRequest())


def test_training_mode_and_random_state_are_left_alone(cut_out: Workspace) -> None:
    plan = plan_run(load_config(cut_out.flags(*RULE)))
    data = load_data(plan)
    teacher, head = build_teacher(plan, data, CPU)
    assert isinstance(teacher, Teacher)
    module = build_module(plan, data, CPU, head)
    module.student.train()
    before = torch.get_rng_state()
    settled = measure_pairs(plan, teacher, module, data, Console(quiet=True), StopRequest())
    assert torch.equal(before, torch.get_rng_state())
    assert module.student.training and not teacher.lens.model.training
    assert plan.pairs_are_open and not settled.pairs_are_open
    assert teacher.layers == [1, 4, 5] == [pair.teacher for pair in module.objective.pairs]
    # With dropout the divergences would not be these.
    assert settled.divergence_KT is not None
    assert settled.divergence_KT[0][0] == pytest.approx(0, abs=1e-5)


# --- Two processes ------------------------------------------------------------------------------


def as_rank(rank: int, port: int, root: str, flags: list[str]) -> None:
    """Measures as one of two processes, and once more with a signal to the first."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    plan = plan_run(load_config(flags))
    data = load_data(plan)
    teacher, head = build_teacher(plan, data, CPU)
    assert isinstance(teacher, Teacher)
    module = build_module(plan, data, CPU, head)
    real, calls = layer_choice._measure, []

    def measure(*arguments: Any) -> Any:
        calls.append(rank)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    layer_choice._measure = measure  # type: ignore[assignment]
    stop = StopRequest()
    with stop.listening():
        settled = measure_pairs(plan, teacher, module, data, Console(quiet=True), stop)
        found: dict[str, Any] = {
            "pairs": [[pair.teacher, pair.student] for pair in settled.pairs],
            "divergence": settled.divergence_KT,
            "layers": teacher.layers,
        }
        try:
            measure_pairs(plan, teacher, module, data, Console(quiet=True), stop)
        except Stopped as error:
            found["stopped"] = error.exit_code
    found["calls"] = calls
    (Path(root) / f"found{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_two_processes_have_the_same_pairs(cut_out: Workspace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn: Callable[..., Any] = torch.multiprocessing.spawn
    spawn(as_rank, args=(port, str(cut_out.root), cut_out.flags(*RULE)), nprocs=2)
    first, second = (
        json.loads((cut_out.root / f"found{rank}.json").read_text()) for rank in range(2)
    )
    assert (first.pop("calls"), second.pop("calls")) == ([0, 0], [])  # only the first measures
    assert first == second
    assert first["pairs"] == [[1, 1], [4, 2], [5, 3]] and first["layers"] == [1, 4, 5]
    assert first["stopped"] == 143
