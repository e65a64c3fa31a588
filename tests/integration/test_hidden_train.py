"""Whole runs with hidden states and with a lens whose weight changes from step to step."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace, add_dropout, stop_at
from datasets import load_from_disk
from safetensors.torch import load_file

from distilllens.__main__ import main as command
from distilllens.config import load_config
from distilllens.data.order import epoch_batches
from distilllens.data.tokenize import record_lengths, response_rows
from distilllens.runs import create_run_folder
from distilllens.runtime import distributed
from distilllens.session import build_trainer
from distilllens.trainer import Trainer
from train import main

HIDDEN = ("--objective.approach", "kd", "--objective.kd_ratio", "0.5", "--objective.hidden.coeff=2")
PROJECTORS = {"hidden.projectors.0.weight", "hidden.projectors.1.weight"}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def partitioning(workspace: Workspace, precision: str) -> str:
    """ZeRO-3 that really takes weights apart; by default it leaves those below 100,000 whole."""
    content = json.loads(Path(workspace.deepspeed(3, precision)).read_text())
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = workspace.root / "partitioning.json"
    path.write_text(json.dumps(content))
    return str(path)


def exported(run: Path) -> list[Path]:
    return [run / "latest", run / "best", *sorted(run.glob("state/step-*/student"))]


# --- Hidden states ------------------------------------------------------------------------------


def test_a_baseline_of_hidden_states_alone(workspace: Workspace) -> None:
    assert main(workspace.flags(*HIDDEN, "--optim.max_steps", "12", "--optim.lr", "3e-3")) == 0
    first, *_, last = metrics_of(workspace.root / "run")
    names = {"train/loss/hidden", "train/hidden/mse/L01", "train/hidden/mse/L02"}
    for name in names:
        assert last[name] < 0.9 * first[name], name
    distances = (first["train/hidden/mse/L01"] + first["train/hidden/mse/L02"]) / 2
    assert first["train/loss/hidden"] == pytest.approx(distances, rel=1e-6)
    parts = first["train/loss/ce"] + first["train/loss/kd"] + 2 * first["train/loss/hidden"]
    assert first["train/loss"] == pytest.approx(0.5 * parts, rel=1e-6)
    assert not any(name.startswith(("train/lens", "train/loss/lens")) for name in first)
    pairs = json.loads((workspace.root / "run/layers.json").read_text())
    assert pairs == [{"teacher": 2, "student": 1}, {"teacher": 4, "student": 2}]


@pytest.mark.parametrize(
    ("stage", "precision", "flags"),
    [
        (1, "bf16", ()),
        (3, "fp32", ()),
        pytest.param(3, "bf16", (), marks=pytest.mark.slow),
        pytest.param(1, "bf16", ("--model.student_lora.r", "4"), marks=pytest.mark.slow),
        (3, "fp32", ("--model.student_lora.r", "4")),
    ],
    ids=str,
)
def test_exports_hold_the_student_alone(
    workspace: Workspace, stage: int, precision: str, flags: tuple[str, ...]
) -> None:
    """Beside the lens; each evaluation in between runs the student without the projectors."""
    deepspeed = workspace.deepspeed(stage, precision)
    if stage == 3:
        deepspeed = partitioning(workspace, precision)
    hidden = ("--objective.hidden.coeff", "2", "--objective.hidden.loss", "cosine")
    flags = (*flags, *hidden, "--eval.every", "1", "--optim.max_steps", "3", "--optim.lr", "1e-2")
    assert main(workspace.flags(*flags, "--deepspeed", deepspeed, "--tracking.log_every=1")) == 0
    first, *_, last = metrics_of(workspace.root / "run")
    assert last["train/loss/hidden"] < first["train/loss/hidden"]
    student = weights(workspace.root / "student")
    folders = exported(workspace.root / "run")
    assert len(folders) >= 3
    for folder in folders:
        found = weights(folder)
        assert found.keys() == student.keys()
        assert all(found[name].shape == student[name].shape for name in found)


def train_steps(arguments: list[str], count: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns each step's loss and what was trained, projectors too, in float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    def whole(trainer: Trainer, parameter: torch.Tensor) -> torch.Tensor:
        full = parameter if trainer.plan.zero_stage == 0 else safe_get_full_fp32_param(parameter)
        assert full is not None
        return full.detach().clone()

    config, device = load_config(arguments), distributed.initialize()
    losses = []
    with build_trainer(config, create_run_folder(config.run.output_dir), device, arguments) as it:
        for _, batches in zip(range(count), it.epoch(), strict=False):
            before = it.totals.sums_K2.clone()
            it.train_step(batches)
            sums = (it.totals.sums_K2 - before).tolist()
            losses.append(it.plan.objective.losses(sums, batches.num_tokens)["loss"])
        trained = {n: whole(it, p) for n, p in it.module.named_parameters()}
    return losses, trained


def test_zero_stages_train_the_same(workspace: Workspace) -> None:
    flags = (*HIDDEN, "--optim.micro_batch_size", "4", "--optim.accumulation", "2")
    straight, apart = (
        train_steps(workspace.flags(*flags, "--deepspeed", file, out=name), 3)
        for name, file in (
            ("zero0", workspace.deepspeed(0)),
            ("zero3", partitioning(workspace, "fp32")),
        )
    )
    assert len(straight[0]) == 3 and straight[0] == pytest.approx(apart[0], rel=1e-5)
    assert straight[1].keys() == apart[1].keys() >= PROJECTORS
    for name, tensor in straight[1].items():
        own = name.removeprefix("student.")
        torch.testing.assert_close(tensor, apart[1][name], rtol=1e-4, atol=2e-6, msg=own)
    _, begun = train_steps(workspace.flags(*HIDDEN, out="begun"), 0)
    for name in PROJECTORS:
        assert not torch.equal(begun[name], straight[1][name])
        assert begun[name].shape == (48, 24)


def test_projectors_are_decayed_as_matrices(workspace: Workspace) -> None:
    decay = ("--optim.weight_decay", "0.25", "--deepspeed", workspace.deepspeed(0))
    arguments = workspace.flags(*HIDDEN, *decay)
    config, device = load_config(arguments), distributed.initialize()
    with build_trainer(config, create_run_folder(config.run.output_dir), device, arguments) as it:
        assert it.module.hidden is not None
        projectors = {id(parameter) for parameter in it.module.hidden.parameters()}
        groups = it.guard.optimizer.param_groups
    assert len(projectors) == 2 and [g["weight_decay"] for g in groups] == [0.25, 0.0]
    assert projectors <= {id(p) for p in groups[0]["params"]}


def test_a_broken_projector_stops_the_update(workspace: Workspace) -> None:
    """Only the hidden-state sums are not finite: the guard must watch them too."""
    arguments = workspace.flags(*HIDDEN, "--deepspeed", workspace.deepspeed(0))
    config, device = load_config(arguments), distributed.initialize()
    with build_trainer(config, create_run_folder(config.run.output_dir), device, arguments) as it:
        assert it.module.hidden is not None
        before = [p.detach().clone() for p in it.module.student.parameters()]
        next(it.module.hidden.parameters()).data[0, 0] = math.inf
        it.train_step(next(it.epoch()))
        assert it.totals.sums_K2[0].isfinite().all() and it.totals.sums_K2[2].isfinite().all()
        bad = it.guard.bad_step()
        assert not it.totals.sums_K2[1].isfinite().all() and bad is not None and bad.step == 1
        after = it.module.student.parameters()
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_teacher_cache_serves_hidden_states(workspace: Workspace) -> None:
    cache = (
        "--model.teacher_cache",
        str(workspace.root / "cache"),
        "--model.teacher_cache_bits=32",
    )
    flags = (*HIDDEN, "--objective.lens.norm", "none", "--optim.max_steps", "4")
    assert main(workspace.flags(*flags, out="live")) == 0
    assert command(["cache-teacher", *workspace.flags(*flags, *cache)]) == 0
    assert main(workspace.flags(*flags, *cache)) == 0
    live, cached = (metrics_of(workspace.root / name) for name in ("live", "run"))
    for before, after in zip(live, cached, strict=True):
        for name in before:
            if name.startswith("train/"):
                assert after[name] == pytest.approx(before[name], rel=1e-4), name
    for name, tensor in weights(workspace.root / "live/latest").items():
        torch.testing.assert_close(
            tensor, weights(workspace.root / "run/latest")[name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("stage", "schedule"),
    [
        pytest.param(0, "ramp", marks=pytest.mark.slow),
        (0, "deepest_first"),
        (1, "ramp"),
        (3, "shallowest_first"),
    ],
)
def test_stopped_and_resumed_is_bit_equal(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, stage: int, schedule: str
) -> None:
    """In the middle of a rise, with projectors that have learned."""
    add_dropout(workspace)
    flags = (
        *("--objective.hidden.coeff", "2", "--objective.lens.schedule", schedule),
        *("--objective.lens.schedule_share", "0.9", "--tracking.log_every", "1", "--deepspeed"),
        partitioning(workspace, "fp32") if stage == 3 else workspace.deepspeed(stage),
    )
    assert main(workspace.flags(*flags, out="straight")) == 0
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert main(workspace.flags(*flags)) == 128 + signal.SIGTERM
    assert main(workspace.flags(*flags)) == 0

    def numbers(run: Path) -> list[dict[str, Any]]:
        timed = ("time", "perf/")
        return [{k: v for k, v in m.items() if not k.startswith(timed)} for m in metrics_of(run)]

    straight, resumed = (workspace.root / name for name in ("straight", "run"))
    assert numbers(straight) == numbers(resumed)
    for name, tensor in weights(straight / "latest").items():
        assert torch.equal(tensor, weights(resumed / "latest")[name]), name


# --- The lens's weight over the steps -----------------------------------------------------------


def tokens_of_steps(workspace: Workspace) -> list[int]:
    """Returns the response tokens of each step of the first epoch."""
    train = load_from_disk(str(workspace.root / "tokens" / "train"))
    counts = response_rows(train)
    batches = epoch_batches(
        record_lengths(train), batch_size=8, seed=10, epoch=0, group_by_length=True
    )
    return [int(counts[batch].sum()) for batch in batches]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("ramp", [(0, 0), (0.5, 0.5), (1, 1), (1.5, 1.5), (1.5, 1.5), (1.5, 1.5)]),
        ("decay", [(1.5, 1.5), (1.5, 1.5), (1.5, 1.5), (1, 1), (0.5, 0.5), (0, 0)]),
        ("deepest_first", [(0, 0), (0, 1), (0.5, 1.5), (1.5, 1.5), (1.5, 1.5), (1.5, 1.5)]),
        ("shallowest_first", [(0, 0), (1, 0), (1.5, 0.5), (1.5, 1.5), (1.5, 1.5), (1.5, 1.5)]),
    ],
)
def test_the_logged_loss_is_that_of_each_step(
    workspace: Workspace, schedule: str, expected: list[tuple[float, float]]
) -> None:
    """λ of two pairs at six steps; half of them are the rise or fall."""
    flags = (
        *("--objective.lens.schedule", schedule, "--objective.lens.coeff", "1.5"),
        *("--objective.lens.weights", "[1,3]", "--optim.max_steps", "6"),
    )
    assert main(workspace.flags(*flags, "--tracking.log_every", "1", out="fine")) == 0
    steps = metrics_of(workspace.root / "fine")
    means = [(first + second) / 2 for first, second in expected]
    assert [line["train/lens_coeff"] for line in steps] == pytest.approx(means)
    losses = []
    for line, (first, second) in zip(steps, expected, strict=True):
        parts = first * 0.5 * line["train/lens/jsd/L01"], second * 1.5 * line["train/lens/jsd/L02"]
        losses.append(line["train/loss/kd"] + sum(parts) / 2)
        if schedule.endswith("first"):
            by_pair = [line[f"train/lens_coeff/{schedule}/L0{n}"] for n in (1, 2)]
            assert by_pair == pytest.approx([first, second])
        assert line["train/loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert main(workspace.flags(*flags, "--tracking.log_every", "6", out="coarse")) == 0
    (whole,) = metrics_of(workspace.root / "coarse")
    tokens = tokens_of_steps(workspace)
    mean = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    assert whole["train/loss"] == pytest.approx(mean, rel=1e-5)
    assert whole["train/lens_coeff"] == pytest.approx(means[-1])
    constant = whole["train/loss/kd"] + 1.5 * whole["train/loss/lens"]
    assert abs(whole["train/loss"] - constant) > 1e-3  # the test could tell


def test_a_constant_lens_logs_no_coefficient(workspace: Workspace) -> None:
    assert main(workspace.flags("--optim.max_steps", "2")) == 0
    assert "train/lens_coeff" not in metrics_of(workspace.root / "run")[0]


def test_what_is_trained_follows_the_schedule(workspace: Workspace) -> None:
    """The first step of a rise is kd's, that of a decay is the constant lens's."""

    def after_one_step(*flags: str) -> dict[str, torch.Tensor]:
        return train_steps(workspace.flags(*flags, out="-".join(flags) or "plain"), 1)[1]

    plain, ramp = after_one_step(), after_one_step("--objective.lens.schedule=ramp")
    joining = after_one_step("--objective.lens.schedule=deepest_first")
    kd, decay = (
        after_one_step("--objective.approach=kd"),
        after_one_step("--objective.lens.schedule=decay"),
    )
    for name in plain:
        torch.testing.assert_close(ramp[name], kd[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(decay[name], plain[name]) and torch.equal(joining[name], ramp[name])
    assert any((plain[name] - kd[name]).abs().max() > 1e-4 for name in plain)
