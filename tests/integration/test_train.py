"""Real runs of train.main on tiny models: what they write, and that it is right."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Workspace, add_dropout, stop_at
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from distilllens.config import load_config
from train import main


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def status(run: Path) -> dict[str, Any]:
    content = json.loads((run / "status.json").read_text())
    assert isinstance(content, dict)
    return content


def test_a_whole_run(workspace: Workspace) -> None:
    assert main(workspace.flags("--optim.max_steps", "12", "--eval.every", "6")) == 0
    run = workspace.root / "run"
    lines = metrics_of(run)
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == [2, 4, 6, 8, 10, 12]
    for name in ("train/loss", "train/loss/kd", "train/loss/lens", "train/lens/jsd/L01"):
        assert train[-1][name] < train[0][name], name
    first = train[0]
    parts = first["train/loss/kd"] + first["train/loss/lens"]
    assert first["train/loss"] == pytest.approx(parts, rel=1e-5)  # ρ = λ = 1
    mean = (first["train/lens/jsd/L01"] + first["train/lens/jsd/L02"]) / 2
    assert first["train/loss/lens"] == pytest.approx(mean, rel=1e-5)
    assert {"train/lr", "train/grad_norm", "perf/response_tokens_per_s"} <= first.keys()
    assert [line["step"] for line in lines if "eval/dev/loss" in line] == [6, 12]
    assert status(run)["state"] == "finished" and status(run)["code"] == 0
    assert json.loads((run / "layers.json").read_text()) == [
        {"teacher": 2, "student": 1},
        {"teacher": 4, "student": 2},
    ]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["git_commit"]
    data = json.loads((run / "data.json").read_text())
    raw = (workspace.root / "data/toy/raw.jsonl").read_bytes()
    assert len(data["fingerprint"]) == 64
    assert data["source"]["raw_sha256"] == hashlib.sha256(raw).hexdigest()
    assert load_config(["--config", str(run / "config.yaml")]).optim.max_steps == 12


def test_exports_load_in_plain_transformers(workspace: Workspace) -> None:
    assert main(workspace.flags()) == 0
    for name in ("latest", "best"):
        folder = workspace.root / "run" / name
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("Sort: red blue", return_tensors="pt").input_ids
        assert torch.isfinite(model(ids).logits).all()
        assert (folder / "generation_config.json").is_file()
        assert not list(folder.glob("*.bin"))
    before = weights(workspace.root / "student")
    after = weights(workspace.root / "run" / "latest")
    assert before.keys() == after.keys()
    assert not torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])


def test_dev_loss_is_the_mean_over_all_dev_tokens(workspace: Workspace) -> None:
    assert main(workspace.flags("--optim.max_steps", "1")) == 0
    model = GPT2LMHeadModel.from_pretrained(workspace.root / "run/latest").double().eval()
    total, tokens = 0.0, 0
    for sample in load_from_disk(str(workspace.root / "tokens/dev")):
        ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
        start = len(sample["prompt_ids"])
        log_q = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        total -= log_q.gather(1, ids[0, start:, None]).sum().item()
        tokens += ids.shape[1] - start
    (line,) = (m for m in metrics_of(workspace.root / "run") if "eval/dev/loss" in m)
    assert line["eval/dev/loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--objective.approach", "sft"), {"train/loss", "train/loss/ce"}),
        (
            ("--objective.approach", "kd", "--objective.kd_ratio", "0.5"),
            {"train/loss", "train/loss/ce", "train/loss/kd"},
        ),
    ],
)
def test_other_approaches(workspace: Workspace, flags: tuple[str, ...], parts: set[str]) -> None:
    assert main(workspace.flags(*flags, "--optim.max_steps", "4")) == 0
    last = metrics_of(workspace.root / "run")[-2]
    assert {name for name in last if name.startswith("train/loss")} == parts


def test_the_printed_config_repeats_the_run(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = workspace.flags("--objective.lens.weights", "[1, 3]", "--model.student_lora.r", "2")
    with pytest.raises(SystemExit) as stop:
        load_config([*flags, "--print_config"])
    assert stop.value.code in (0, None)
    printed = workspace.root / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(["--config", str(printed)]) == load_config(flags)
    assert yaml.safe_load(printed.read_text())["objective"]["lens"]["weights"] == [1, 3]


def test_dry_run_tells_and_writes_no_run(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*workspace.flags(), "--dry_run"]) == 0
    told = capsys.readouterr().out
    for text in (
        "lens: layer pairs",
        "8 steps of 8 records",
        "first micro-batch: 8 records",
        "### Response:",
        "teacher weights",
    ):
        assert text in told
    assert not (workspace.root / "run").exists()


def test_dry_run_leaves_the_tokens_of_other_lengths_alone(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(workspace.flags("--optim.max_steps", "1")) == 0
    before = {p: p.read_bytes() for p in (workspace.root / "tokens").rglob("*") if p.is_file()}
    assert before
    capsys.readouterr()
    assert main([*workspace.flags("--data.max_length", "300"), "--dry_run"]) == 0
    assert {p: p.read_bytes() for p in before} == before
    assert set((workspace.root / "tokens").rglob("*")) >= set(before)
    assert "would be tokenised anew: max_length was" in capsys.readouterr().err


@pytest.mark.parametrize("stops", [(3,), (2, 7)])
def test_stopped_and_resumed_is_bit_equal(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stops: tuple[int, ...],
) -> None:
    """6 steps an epoch: the second stop lies in the next epoch."""
    add_dropout(workspace)  # the random state must come back too
    flags = ("--optim.max_steps", "9", "--tracking.log_every", "1")
    assert main(workspace.flags(*flags, out="straight")) == 0
    for step in stops:
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            assert main(workspace.flags(*flags)) == 128 + signal.SIGTERM
        assert f"SIGTERM: saved step {step}" in capsys.readouterr().err
        assert status(workspace.root / "run")["state"] == "stopped"
    assert main(workspace.flags(*flags)) == 0
    assert f"resuming from step {stops[-1]}" in capsys.readouterr().out
    straight, resumed = (workspace.root / name for name in ("straight", "run"))
    for name, tensor in weights(straight / "latest").items():
        assert torch.equal(tensor, weights(resumed / "latest")[name]), name

    def numbers(run: Path) -> list[dict[str, Any]]:
        timed = ("time", "perf/")
        return [{k: v for k, v in m.items() if not k.startswith(timed)} for m in metrics_of(run)]

    assert numbers(straight) == numbers(resumed)


def test_throughput_counts_prompts_too_but_no_padding(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for one epoch, with a stop in the middle; both counts have the same clock."""
    flags = workspace.flags(
        *("--optim.max_steps", "6", "--tracking.log_every", "6"),
        *("--optim.micro_batch_size", "4", "--optim.accumulation", "2"),
    )
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        assert main(flags) == 143
    assert main(flags) == 0
    (line,) = (m for m in metrics_of(workspace.root / "run") if "train/loss" in m)
    train = load_from_disk(str(workspace.root / "tokens/train"))
    assert len(train) == 6 * 8
    responses = sum(len(ids) for ids in train["response_ids"])
    whole = responses + sum(len(ids) for ids in train["prompt_ids"])
    factor = line["perf/tokens_per_s"] / line["perf/response_tokens_per_s"]
    assert factor == pytest.approx(whole / responses)
    rate = line["perf/tokens_per_s"] * line["perf/step_s"]
    assert rate == pytest.approx(whole / 6)


def test_time_limit(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(workspace.flags("--run.max_wall_time", "0:00:00")) == 75
    assert "time limit: saved step 1" in capsys.readouterr().err
    assert main(workspace.flags()) == 0


def test_a_finished_run_is_not_overwritten(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(workspace.flags("--optim.max_steps", "2")) == 0
    before = (workspace.root / "run/metrics.jsonl").read_text()
    assert main(workspace.flags("--optim.max_steps", "2")) == 2
    assert "holds a run already (state: finished)" in capsys.readouterr().err
    assert (workspace.root / "run/metrics.jsonl").read_text() == before
    assert status(workspace.root / "run")["state"] == "finished"


def test_resume_refuses_other_options(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert main(workspace.flags()) == 143
    assert main(workspace.flags("--optim.lr", "5e-4")) == 4
    assert "optim.lr  0.001 → 0.0005" in capsys.readouterr().err
    assert main(workspace.flags("--run.resume", "must", out="elsewhere")) == 4


def test_non_finite_loss_stops_before_the_update(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--optim.lr", "1e30", "--optim.clip_grad", "0", "--eval.every", "1")
    assert main(workspace.flags(*flags, "--objective.approach", "kd")) == 5
    error = capsys.readouterr().err
    assert "error[DL-NUMERICS]: non-finite loss at step 2 (loss=nan, loss/ce=nan" in error
    run = workspace.root / "run"
    assert f"kept: {run}/state/step-1, {run}/latest" in error
    assert status(workspace.root / "run")["code"] == 5


def test_a_model_that_is_broken_already(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GPT2LMHeadModel.from_pretrained(workspace.root / "student")
    model.get_parameter("transformer.h.1.mlp.c_fc.bias").data[0] = float("nan")
    model.save_pretrained(workspace.root / "student")
    assert main(workspace.flags()) == 2
    assert "gives logits that are not finite" in capsys.readouterr().err
    assert status(workspace.root / "run")["state"] == "failed"
    model.get_parameter("transformer.h.1.mlp.c_fc.bias").data[0] = 0.0
    model.save_pretrained(workspace.root / "student")
    assert main(workspace.flags("--optim.max_steps", "2")) == 0  # nothing was saved: starts anew
    assert main(workspace.flags("--run.resume", "never")) == 2


def test_a_run_that_never_improves_has_a_best(workspace: Workspace) -> None:
    """With a learning rate this high the dev loss only grows."""
    flags = ("--objective.approach", "sft", "--optim.lr", "0.5", "--eval.every", "2")
    assert main(workspace.flags(*flags, "--optim.max_steps", "6")) == 0
    run = workspace.root / "run"
    losses = [m["eval/dev/loss"] for m in metrics_of(run) if "eval/dev/loss" in m]
    best = losses.index(min(losses))
    assert status(run)["best_step"] == 2 * (best + 1)
    assert AutoModelForCausalLM.from_pretrained(run / "best") is not None


def test_rouge_chooses_best(workspace: Workspace) -> None:
    flags = ("--eval.metric", "rougeL", "--eval.max_new_tokens", "8", "--data.max_prompt_length")
    assert main(workspace.flags(*flags, "110", "--optim.max_steps", "2")) == 0
    line = metrics_of(workspace.root / "run")[-1]
    assert 0 <= line["eval/dev/rougeL"] <= 100
    assert status(workspace.root / "run")["best_metric"] == line["eval/dev/rougeL"]


def test_lora_trains_the_adapter_and_exports_it_merged(workspace: Workspace) -> None:
    assert main(workspace.flags("--model.student_lora.r", "4", "--optim.lr", "1e-2")) == 0
    before = weights(workspace.root / "student")
    after = weights(workspace.root / "run/best")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".attn." in name or ".mlp." in name for name in changed)


def test_gradient_checkpointing_changes_nothing(workspace: Workspace) -> None:
    for value in ("false", "true"):
        assert main(workspace.flags("--model.gradient_checkpointing", value, out=value)) == 0
    plain, recomputed = (weights(workspace.root / v / "latest") for v in ("false", "true"))
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16(workspace: Workspace, stage: int) -> None:
    assert main(workspace.flags("--deepspeed", workspace.deepspeed(stage, "bf16"))) == 0
    train = [m for m in metrics_of(workspace.root / "run") if "train/loss" in m]
    assert train[-1]["train/loss"] < train[0]["train/loss"]
    exported = weights(workspace.root / "run/best")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
def test_other_families(workspace: Workspace, family: str, request: pytest.FixtureRequest) -> None:
    build: Callable[..., torch.nn.Module] = request.getfixturevalue(family)
    for name, size in (("teacher", 6), ("student", 3)):
        build(n_layer=size, n_embd=8 * size, n_head=2, seed=size).save_pretrained(  # type: ignore[operator]
            workspace.root / name
        )
    assert main(workspace.flags()) == 0
    train = [m for m in metrics_of(workspace.root / "run") if "train/loss" in m]
    assert train[-1]["train/loss"] < train[0]["train/loss"]


def test_padded_teacher_vocabulary_is_cut(
    workspace: Workspace,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = tiny_gpt2(vocab=320, n_layer=6, n_embd=48, n_head=2, seed=1)
    teacher.save_pretrained(workspace.root / "teacher")
    assert main(workspace.flags("--optim.max_steps", "2")) == 0
    assert "teacher vocabulary 320 cut to 300 (padding, no tokens)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ("--optim.clip_grad", "0"),
        ("--optim.clip_grad", "0.005"),
        ("--optim.clip_grad", "1e-4", "--model.student_lora.r", "2"),
    ],
    ids=" ".join,
)
def test_without_zero_the_gradient_is_clipped_and_its_norm_told_as_with_it(
    workspace: Workspace, flags: tuple[str, ...]
) -> None:
    more = ("--optim.max_steps", "4", "--tracking.log_every", "1", "--optim.accumulation", "2")
    norms = []
    for stage in (0, 1):
        file = ("--deepspeed", workspace.deepspeed(stage))
        arguments = workspace.flags(*flags, *more, "--optim.micro_batch_size", "4", *file)
        assert main([*arguments, "--run.output_dir", f"{workspace.root}/stage{stage}"]) == 0
        lines = metrics_of(workspace.root / f"stage{stage}")
        norms.append([line["train/grad_norm"] for line in lines if "train/loss" in line])
    assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(norms[0]) > float(flags[1]), "nothing was clipped"
    one, other = (weights(workspace.root / f"stage{stage}/latest") for stage in (0, 1))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_train_and_export_the_same(workspace: Workspace, stage: int) -> None:
    for zero in (1, stage):
        deepspeed = workspace.deepspeed(zero)
        assert main(workspace.flags("--deepspeed", deepspeed, out=f"stage{zero}")) == 0
    one, other = (weights(workspace.root / f"stage{zero}/best") for zero in (1, stage))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
