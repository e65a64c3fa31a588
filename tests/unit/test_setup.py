"""What a run is made of before it starts: optimizer groups, the DeepSpeed file, steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from distilllens.config import OptimConfig, TrainConfig, load_config
from distilllens.errors import ConfigError, DataError
from distilllens.training.deepspeed_file import load_deepspeed_config
from distilllens.training.setup import build_optimizer, count_steps, plan_run

FAMILIES = ["tiny_gpt2", "tiny_llama", "tiny_qwen2"]
CONFIG = TrainConfig(optim=OptimConfig(weight_decay=0.125, lr=0.5))


def names_by_decay(module: nn.Module) -> dict[str, float]:
    """Returns each optimised parameter's name and weight decay."""
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = build_optimizer(module, CONFIG).param_groups
    assert all(group["lr"] == 0.5 for group in groups)
    found = [(name_of[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_are_not_decayed(family: str, request: pytest.FixtureRequest) -> None:
    """By the kind of module, in every family; inside a wrapper, as in training."""
    build: Callable[[], nn.Module] = request.getfixturevalue(family)
    model = nn.ModuleDict({"student": build()})
    decay = names_by_decay(model)
    assert decay.keys() == dict(model.named_parameters()).keys()
    seen = {"norm": 0, "bias": 0, "matrix": 0}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if full not in decay:
                continue  # a head tied to the embedding goes by its first name
            if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
                kind = "norm"
            elif name == "bias":
                kind = "bias"
            else:
                assert isinstance(module, nn.Linear | nn.Embedding | Conv1D), full
                kind = "matrix"
            seen[kind] += 1
            assert decay[full] == (0.125 if kind == "matrix" else 0.0), full
    biases = {"tiny_gpt2": 3 * 4, "tiny_llama": 0, "tiny_qwen2": 3 * 3}
    norms = {"tiny_gpt2": 2 * (2 * 3 + 1)}
    assert seen["norm"] == norms.get(family, 2 * 3 + 1)
    assert seen["bias"] == biases[family] and seen["matrix"] > 12


def test_only_the_adapter_is_optimised(tiny_llama: Callable[[], nn.Module]) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    decay = names_by_decay(model)
    assert len(decay) == 3 * 2 and set(decay.values()) == {0.125}
    assert all("lora_" in name for name in decay)


# --- The DeepSpeed file -------------------------------------------------------------------------


def load(tmp_path: Path, content: Any, dtype: Any = "auto") -> tuple[dict[str, Any], torch.dtype]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    defaults = TrainConfig()
    optim = OptimConfig(micro_batch_size=3, accumulation=5, clip_grad=0.25)
    model = type(defaults.model)(dtype=dtype)
    return load_deepspeed_config(TrainConfig(deepspeed=str(path), optim=optim, model=model))


BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
FP16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def offload(stage: int, **parts: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **parts}}


def test_optim_section_goes_into_the_deepspeed_file(tmp_path: Path) -> None:
    content, dtype = load(tmp_path, {"zero_optimization": {"stage": 2, "overlap_comm": False}})
    assert dtype == torch.float32
    assert content["train_micro_batch_size_per_gpu"] == 3
    assert content["gradient_accumulation_steps"] == 5
    assert content["gradient_clipping"] == 0.25
    assert content["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    alone, _ = load(tmp_path, {"zero_optimization": {"stage": 0}})
    assert alone["gradient_clipping"] == 0.0  # the trainer clips, and keeps the norm
    assert load(tmp_path, BF16)[1] == load(tmp_path, BF16, "bfloat16")[1] == torch.bfloat16
    assert load(tmp_path, FP16)[1] == load(tmp_path, FP16, "float16")[1] == torch.float16
    assert content["zero_force_ds_cpu_optimizer"] is False  # our AdamW also beside the CPU's states


@pytest.mark.parametrize(
    ("content", "dtype", "told"),
    [
        ("{", "auto", "not JSON"),
        ([], "auto", "expected a JSON object"),
        ({"optimizer": {}, "scheduler": {}}, "auto", "remove optimizer, scheduler"),
        ({"train_batch_size": 8}, "auto", "remove train_batch_size"),
        ({"gradient_clipping": 1}, "auto", "remove gradient_clipping"),
        ({"fp16": {"enabled": True}}, "auto", "fp16 needs ZeRO stage 1 or more"),
        (BF16 | {"fp16": {"enabled": True}}, "auto", "fp16 and bf16 are both on"),
        (FP16 | {"fp16": {"enabled": True, "loss_scale": 128}}, "auto", "loss_scale=128 must be 0"),
        ({"bf16": {"enabled": True}}, "auto", "bf16 needs ZeRO stage 1 or more"),
        (BF16, "float32", "model.dtype=float32, but .* is for bf16"),
        (FP16, "bfloat16", "model.dtype=bfloat16, but .* is for fp16"),
        ({}, "bfloat16", "model.dtype=bfloat16, but .* is for fp32"),
        (offload(0, offload_optimizer={"device": "cpu"}), "auto", "needs ZeRO stage 1 or more"),
        (offload(2, offload_param={"device": "cpu"}), "auto", "offload_param needs ZeRO stage 3"),
        (offload(3, offload_param={"device": "nvme"}), "auto", "must be none or cpu, got 'nvme'"),
        (offload(3, offload_optimizer=True), "auto", "offload_optimizer must be an object, got Tr"),
        (
            offload(1, offload_optimizer="cpu"),
            "auto",
            "offload_optimizer must be an object, got 'c",
        ),
        (offload(3, offload_param=[]), "auto", r"offload_param must be an object, got \[\]"),
        (offload(3, offload_param={"device": True}), "auto", "must be none or cpu, got True"),
        (
            offload(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "auto",
            r"offload_optimizer\.ratio must be 1",
        ),
    ],
)
def test_refused_deepspeed_files(tmp_path: Path, content: Any, dtype: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, content, dtype)


def test_a_deepspeed_file_is_looked_for_from_the_projects_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, told in (("configs/deepspeed/zero2_bf16.json", True), (f"{tmp_path}/x.json", False)):
        with pytest.raises(ConfigError, match="no such file") as caught:
            load_deepspeed_config(TrainConfig(deepspeed=path))
        assert ("paths start at the project's root" in caught.value.fix) is told
        assert (str(tmp_path) in caught.value.why) is told


def test_no_offload_can_be_written_as_null(tmp_path: Path) -> None:
    content, _ = load(tmp_path, offload(2, offload_optimizer=None))
    assert content["zero_optimization"]["offload_optimizer"] is None


# --- Steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "processes", "options", "expected"),
    [
        (100, 1, {}, (12, 8, 36)),  # 4 × 2 records a step; 4 records a epoch are left out
        (100, 3, {}, (4, 24, 12)),
        (8, 1, {}, (1, 8, 3)),
        (100, 1, {"max_steps": 5}, (12, 8, 5)),
        (100, 1, {"max_steps": 50, "epochs": 1}, (12, 8, 50)),
    ],
)
def test_step_count(
    records: int, processes: int, options: dict[str, int], expected: tuple[int, int, int]
) -> None:
    optim = OptimConfig(**{"epochs": 3, "micro_batch_size": 4, "accumulation": 2, **options})  # type: ignore[arg-type]
    steps = count_steps(TrainConfig(optim=optim), records, processes)
    assert (steps.steps_per_epoch, steps.global_batch, steps.total_steps) == expected


def test_fewer_records_than_one_batch() -> None:
    optim = OptimConfig(micro_batch_size=4, accumulation=2)
    with pytest.raises(DataError, match=r"15 training records .* global batch of 16") as caught:
        count_steps(TrainConfig(optim=optim), 15, 2)
    assert "4 per process × 2 accumulated × 2 processes" in caught.value.why


def test_answers_in_stage_3_are_for_one_process(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process would answer other prompts, with weights that all must gather together."""
    flags = ("--deepspeed", workspace.deepspeed(3), "--eval.metric", "rougeL")
    plan_run(load_config(workspace.flags(*flags)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="rougeL does not go with ZeRO stage 3"):
        plan_run(load_config(workspace.flags(*flags)))
