"""Which model is the best, which state is the newest, and folders that never stand half written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerFast

from distilllens.checkpoint import (
    TrainState,
    check_same_config,
    copy_model,
    export_model,
    find_state,
    saved_states,
)
from distilllens.config import OptimConfig, RunConfig, TrackingConfig, TrainConfig
from distilllens.errors import CheckpointError, StorageError
from distilllens.runs import RunFolder

# --- The best -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "larger", "best_step"),
    [
        ([3.0, 2.0, 1.0], False, 3),
        ([3.0, 1.0, 2.0], False, 2),
        ([1.0, 1.0, 1.0], False, 1),  # a tie keeps the earlier one
        ([1.0, 3.0, 2.0], True, 2),
        ([3.0, 2.0, 3.0], True, 1),
        ([math.nan, 5.0, math.nan], False, 2),  # any number is better than none
        ([math.nan, 5.0, 6.0], True, 3),
        ([2.0, math.nan, 1.0], False, 3),
        ([2.0, math.nan, 3.0], False, 1),
        ([math.nan, math.nan], False, 1),  # there is always a best/
        ([math.inf, 3.0], False, 2),
        ([0.0, -1.0], True, 1),
    ],
)
def test_take_if_best(metrics: list[float], larger: bool, best_step: int) -> None:
    state = TrainState()
    taken = []
    for state.step, metric in enumerate(metrics, start=1):
        if state.take_if_best(metric, larger=larger):
            taken.append(state.step)
    assert taken[0] == 1 and taken[-1] == state.best_step == best_step
    best = metrics[best_step - 1]
    assert state.best_metric is not None
    assert state.best_metric == best or math.isnan(best)


# --- Exports ------------------------------------------------------------------------------------

ENGINE = SimpleNamespace(zero_optimization_partition_weights=lambda: False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_export_loads_again_and_replaces(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    folder = tmp_path / "latest"
    for seed in (1, 2):
        export_model(ENGINE, tiny_gpt2(seed=seed), tiny_tokenizer, folder)
        if seed == 1:
            (folder / "left-over").touch()
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        expected = tiny_gpt2(seed=seed).state_dict()
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, expected[name]), name
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]  # no drafts, no old ones
    names = {p.name for p in folder.iterdir()}
    assert "left-over" not in names and not any(name.endswith(".bin") for name in names)
    assert names >= {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_adapters_are_merged_in_the_export_only(
    tmp_path: Path,
    tiny_llama: Callable[..., nn.Module],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    student = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    export_model(ENGINE, student, tiny_tokenizer, tmp_path / "best")
    ids = torch.tensor([[4, 9, 250]])
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "best").eval()(ids).logits
        torch.testing.assert_close(exported, student(input_ids=ids).logits)
        assert not torch.allclose(exported, tiny_llama()(ids).logits, atol=1e-3)
    assert len([n for n, _ in student.named_parameters() if "lora_" in n]) == 6  # goes on training


FULL = OSError(28, "No space left on device")
FAILURES = {
    "tokenizer": ("PreTrainedTokenizerFast", FULL),
    "weights, safetensors": ("GPT2LMHeadModel", SafetensorError("No space left (os error 28)")),
    "weights, torch": ("GPT2LMHeadModel", RuntimeError("unexpected pos 64 vs 0")),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failed_export_leaves_the_old_one(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    build_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = tiny_gpt2(seed=1), build_tokenizer()
    folder = tmp_path / "best"
    export_model(ENGINE, model, tokenizer, folder)
    before = contents(folder)
    fails, error = FAILURES[where]

    def fail(path: str | Path, *_: object, **__: object) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "half").write_bytes(b"half a file")
        raise error

    target = model if fails == "GPT2LMHeadModel" else tokenizer
    monkeypatch.setattr(target, "save_pretrained", fail)
    with pytest.raises(StorageError) as caught:
        export_model(ENGINE, model, tokenizer, folder)
    assert caught.value.exit_code == 6
    assert f"could not write {folder}" in caught.value.what and "GB free" in caught.value.what
    assert caught.value.why == str(error)
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_failed_copy_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("latest", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(name)

    def fail(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "model").write_text("ha")
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", fail)
        with pytest.raises(StorageError):
            copy_model(tmp_path / "latest", tmp_path / "best")
    assert (tmp_path / "best/model").read_text() == "best"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest"]
    copy_model(tmp_path / "latest", tmp_path / "best")
    assert (tmp_path / "best/model").read_text() == "latest"
    assert (tmp_path / "latest/model").read_text() == "latest"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest"]


def test_the_new_folder_is_complete_when_it_appears(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Whatever is renamed into place holds every file already."""
    arrived: list[set[str]] = []
    rename = os.rename

    def watch(source: Path, target: Path) -> None:
        arrived.append({p.name for p in Path(source).iterdir()})
        rename(source, target)

    monkeypatch.setattr("os.rename", watch)
    export_model(ENGINE, tiny_gpt2(), tiny_tokenizer, tmp_path / "best")
    assert len(arrived) == 1
    assert arrived[0] == {p.name for p in (tmp_path / "best").iterdir()}


# --- States -------------------------------------------------------------------------------------


def commit(folder: Path, *steps: int, config: TrainConfig | None = None) -> None:
    """Makes states as far as they are looked for."""
    for step in steps:
        path = folder / f"step-{step}"
        path.mkdir(parents=True)
        saved = {"step": step, "config": dataclasses.asdict(config or TrainConfig())}
        (path / "state.json").write_text(json.dumps(saved))


def test_the_newest_committed_state_is_found(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    commit(run.state, 9, 10, 2)  # by number: as text, 9 comes after 10
    (run.state / "step-11").mkdir()  # no state.json: not committed
    draft = run.state / ".tmp-step-12"
    draft.mkdir()
    (draft / "state.json").write_text("{}")
    assert [path.name for path in saved_states(run.state)] == ["step-2", "step-9", "step-10"]
    for resume in ("auto", "must"):
        assert find_state(run, resume) == run.state / "step-10"
    assert find_state(run, "never") is None
    assert find_state(run, str(run.state / "step-2")) == run.state / "step-2"


def test_no_state(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new")
    assert find_state(run, "auto") is None and find_state(run, "never") is None
    with pytest.raises(CheckpointError, match=r"run\.resume=must, but .* holds no saved state"):
        find_state(run, "must")
    (tmp_path / "step-3").mkdir()
    for path in (tmp_path / "step-3", tmp_path / "gone"):
        with pytest.raises(CheckpointError, match="is no saved state") as caught:
            find_state(run, str(path))
        assert caught.value.exit_code == 4


def test_options_that_shape_the_run_must_stay(tmp_path: Path) -> None:
    before = TrainConfig(optim=OptimConfig(lr=1e-3, epochs=2))
    commit(tmp_path, 5, config=before)
    state = tmp_path / "step-5"
    check_same_config(state, before)
    watched = dataclasses.replace(
        before,
        run=RunConfig(output_dir="elsewhere", name="x", max_wall_time="1:00:00", resume="must"),
        tracking=TrackingConfig(log_every=1, wandb="offline"),
        debug=True,
    )
    check_same_config(state, watched)
    changed = dataclasses.replace(
        before, run=RunConfig(seed=11), optim=OptimConfig(lr=1e-4, epochs=2)
    )
    with pytest.raises(CheckpointError) as caught:
        check_same_config(state, changed)
    assert caught.value.what.endswith("other options: optim.lr: 0.001 → 0.0001; run.seed: 10 → 11")
