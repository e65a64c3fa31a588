"""Which model is the best, which state is the newest, and folders that never stand half written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerFast

from distilllens.__main__ import main as command
from distilllens.checkpoint import TrainState
from distilllens.config import OptimConfig, RunConfig, TrackingConfig, TrainConfig
from distilllens.errors import CheckpointError, StorageError
from distilllens.publish.export import copy_model, export_model
from distilllens.runs import RunFolder
from distilllens.runtime import distributed
from distilllens.runtime.faults import VARIABLE
from distilllens.runtime.manifest import find_damage, hash_folder, write_manifest
from distilllens.runtime.random_state import random_state, seed_new_rank, set_random_state
from distilllens.training.resume import check_same_config, check_same_facts, find_state

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

FACTS = {
    "world_size": 1,
    "zero_stage": 0,
    "precision": "torch.float32",
    "begun_at": "",
    "global_batch": 32,
    "data_fingerprint": "d" * 64,
    "tokenizer_sha256": "t" * 64,
}


def commit(folder: Path, *steps: int, config: TrainConfig | None = None, **facts: object) -> None:
    """Makes states as far as they are looked for and compared."""
    for step in steps:
        path = folder / f"step-{step}"
        (path / "student").mkdir(parents=True)
        (path / "student/config.json").write_text(f"{step}")
        saved = {"step": step, "config": dataclasses.asdict(config or TrainConfig())}
        (path / "state.json").write_text(json.dumps(saved))
        write_manifest(path, hash_folder(path), {**FACTS, "step": step, **facts})


def test_the_newest_good_state_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    commit(run.state, 9, 10, 2)  # by number: as text, 9 comes after 10
    for resume in ("auto", "must"):
        assert find_state(run, resume) == run.state / "step-10"
    assert find_state(run, "never") is None
    assert find_state(run, str(run.state / "step-2")) == run.state / "step-2"
    assert not caplog.records


def test_damaged_states_are_named_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    commit(run.state, 2, 9, 10)
    (run.state / "step-9/state.json").write_text("{}")
    (run.state / "step-10/manifest.json").unlink()
    assert find_state(run, "auto") == run.state / "step-2"
    size = len(json.dumps({"step": 9, "config": dataclasses.asdict(TrainConfig())}))
    assert [record.message for record in caplog.records] == [
        f"{run.state}/step-10/manifest.json is missing; it is now damaged-step-10, "
        f"going on from {run.state}/step-2",
        f"{run.state}/step-9/state.json has 2 of {size:,} bytes; it is now damaged-step-9, "
        f"going on from {run.state}/step-2",
    ]
    left = sorted(path.name for path in run.state.iterdir())
    assert left == ["damaged-step-10", "damaged-step-9", "step-2"]
    commit(run.state, 9)  # the run comes by again, and its disk fails again
    (run.state / "step-9/state.json").unlink()
    assert find_state(run, "auto") == run.state / "step-2"
    assert (run.state / "damaged-step-9-2").is_dir()


def test_where_all_are_damaged_nothing_starts_and_nothing_changes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    commit(run.state, 2, 9)
    for step in (2, 9):
        (run.state / f"step-{step}/state.json").write_text("{}")
    before = contents(run.state)
    for resume in ("auto", "must", "auto"):
        with pytest.raises(CheckpointError, match=r"every saved state of .* is damaged") as caught:
            find_state(run, resume)
        assert caught.value.exit_code == 4
        assert all(f"step-{step}/state.json has 2 of" in caught.value.why for step in (2, 9))
    assert contents(run.state) == before
    with pytest.raises(CheckpointError, match=r"step-9 is no saved state\n.*has 2 of"):
        find_state(run, str(run.state / "step-9"))


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


def test_leftovers_of_a_dead_run_are_named_and_cleaned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    commit(run.state, 2)
    for name in ("state/.tmp-step-4", "state/.tmp-step-1-deleted", ".tmp-latest-17"):
        (tmp_path / name / "sub").mkdir(parents=True)
    for name in (".old-best-17", ".old-latest-18", "latest"):  # best/ itself is not there
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(name)
    assert find_state(run, "auto") == run.state / "step-2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", "state"]
    assert (tmp_path / "best/model").read_text() == ".old-best-17"
    assert (tmp_path / "latest/model").read_text() == "latest"
    assert [p.name for p in run.state.iterdir()] == ["step-2"]
    told = "\n".join(record.message for record in caplog.records)
    for name in (".tmp-step-4", ".tmp-step-1-deleted", ".tmp-latest-17", ".old-latest-18"):
        assert f"{name} is removed" in told
    assert f"{tmp_path}/best is back" in told


# --- The same run -------------------------------------------------------------------------------


def test_options_that_shape_the_run_must_stay(tmp_path: Path) -> None:
    before = TrainConfig(optim=OptimConfig(lr=1e-3, epochs=2))
    commit(tmp_path, 5, config=before)
    state = tmp_path / "step-5"
    check_same_config(state, before)
    watched = dataclasses.replace(
        before,
        run=RunConfig(
            output_dir="elsewhere", name="x", max_wall_time="1:00:00", resume="must", keep=9
        ),
        tracking=TrackingConfig(log_every=1, wandb="offline"),
        debug=True,
    )
    check_same_config(state, watched)
    changed = dataclasses.replace(
        before, run=RunConfig(seed=11), optim=OptimConfig(lr=1e-4, epochs=2)
    )
    with pytest.raises(CheckpointError) as caught:
        check_same_config(state, changed)
    table = "\n    optim.lr  0.001 → 0.0001\n    run.seed  10 → 11"
    assert caught.value.why == f"saved → now:{table}"
    allowed = dataclasses.replace(changed, run=RunConfig(seed=11, allow_changes=True))
    assert check_same_config(state, allowed) == table
    assert check_same_config(state, dataclasses.replace(before, run=allowed.run)) == (
        "\n    run.seed  10 → 11"
    )


def test_data_and_tokenizer_must_stay(tmp_path: Path) -> None:
    commit(tmp_path, 5)
    state, other = tmp_path / "step-5", {**FACTS, "data_fingerprint": "e"}
    check_same_facts(state, {**FACTS, "epoch": 3}, allow_changes=False)
    with pytest.raises(CheckpointError, match=r"\n    data_fingerprint  ddd.* → e\n"):
        check_same_facts(state, other, allow_changes=False)
    assert " → e" in check_same_facts(state, other, allow_changes=True)
    with pytest.raises(CheckpointError, match=r"zero_stage"):  # no wish makes that fit
        check_same_facts(state, {**FACTS, "zero_stage": 3}, allow_changes=True)


def optim(micro_batch: int, accumulation: int, lr: float = 1e-3) -> TrainConfig:
    return TrainConfig(
        optim=OptimConfig(micro_batch_size=micro_batch, accumulation=accumulation, lr=lr)
    )


@pytest.mark.parametrize(
    ("saved", "processes", "cut", "fix"),
    [
        (1, 2, (8, 2), ""),
        (4, 1, (8, 4), ""),
        (4, 2, (1, 16), ""),
        (1, 2, (8, 4), "--optim.micro_batch_size 8 --optim.accumulation 2"),
        (2, 8, (8, 2), "--optim.micro_batch_size 4 --optim.accumulation 1"),
        (1, 4, (6, 2), "--optim.micro_batch_size 2 --optim.accumulation 4"),
        (1, 3, (8, 4), "start a number of processes that divides 32"),
    ],
)
def test_another_number_of_processes_keeps_the_global_batch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: int,
    processes: int,
    cut: tuple[int, int],
    fix: str,
) -> None:
    commit(tmp_path, 5, config=optim(32 // saved, 1), world_size=saved)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    if not fix:
        check_same_config(tmp_path / "step-5", optim(*cut))
        with pytest.raises(CheckpointError, match=r"optim\.lr  0\.001 → 0\.1"):
            check_same_config(tmp_path / "step-5", optim(*cut, lr=0.1))
        return
    with pytest.raises(CheckpointError) as caught:
        check_same_config(tmp_path / "step-5", optim(*cut))
    assert caught.value.fix == fix
    if "optim" in fix:  # and what is advised is right
        micro_batch, accumulation = (int(word) for word in fix.split() if word.isdigit())
        check_same_config(tmp_path / "step-5", optim(micro_batch, accumulation))


def test_with_one_number_of_processes_the_cut_must_stay(tmp_path: Path) -> None:
    commit(tmp_path, 5, config=optim(16, 2))
    with pytest.raises(CheckpointError, match=r"optim\.accumulation +2 → 4"):
        check_same_config(tmp_path / "step-5", optim(8, 4))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_of_another_number_of_processes_are_refused_with_a_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    commit(tmp_path, 5, config=optim(16, 1), world_size=2, zero_stage=stage)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    with pytest.raises(CheckpointError, match="saved by 2 processes, this run has 1") as caught:
        check_same_config(tmp_path / "step-5", optim(16, 2))
    assert caught.value.exit_code == 4
    assert "start 2 processes" in caught.value.fix and "distilllens export" in caught.value.fix


# --- Random numbers -----------------------------------------------------------------------------


def draws() -> list[float]:
    """One draw of each generator; those of the normal distributions keep half of a pair."""
    return [
        torch.rand(1).item(),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
    ]


@pytest.mark.parametrize("drawn", [0, 1, 2])
def test_every_generator_comes_back(tmp_path: Path, drawn: int) -> None:
    for _ in range(drawn):
        draws()
    file = tmp_path / "random.safetensors"
    file.write_bytes(to_safetensors(random_state()))
    expected = [draws() for _ in range(700)]  # beyond the 624 words of one state
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    draws()
    set_random_state(load_file(file), torch.device("cpu"))
    assert [draws() for _ in range(700)] == expected


def test_a_new_rank_draws_its_own_numbers() -> None:
    drawn = []
    for seed, rank, step in ((1, 2, 3), (1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2, 4)):
        seed_new_rank(seed, rank, step)
        drawn.append(tuple(draws()))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4


# --- The export command -------------------------------------------------------------------------


def test_export_of_a_run_takes_the_newest_good_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tmp_path / "run/state", 2, 4, 6)
    (tmp_path / "run/state/step-6/state.json").unlink()
    for number, path in enumerate(("run", "run/state/step-2")):
        target = tmp_path / f"out/{number}"
        assert command(["export", str(tmp_path / path), "--to", str(target)]) == 0
        assert (target / "config.json").read_text() == ("4", "2")[number]
    out, err = capsys.readouterr()
    assert "step 4" in out and "passed over: " in err and "step-6/state.json is missing" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1"]
    assert all(find_damage(tmp_path / f"run/state/step-{n}") == "" for n in (2, 4))


@pytest.mark.parametrize("point", ["export.verified", "export.copied", "replace.before"])
def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tmp_path / "run/state", 2)
    monkeypatch.setenv(VARIABLE, f"{point}=ENOSPC")
    assert command(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 6
    error = capsys.readouterr().err
    assert "no space left" in error and "step-2 is untouched" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("path", "to", "code", "text"),
    [
        ("run", "there", 2, "is there already"),
        ("run/state/step-6", "new", 4, "step-6/state.json is missing"),
        ("nothing", "new", 4, "nothing is no good checkpoint"),
        ("empty", "new", 4, "holds no good checkpoint"),
    ],
)
def test_export_refuses(
    tmp_path: Path, path: str, to: str, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tmp_path / "run/state", 2, 6)
    (tmp_path / "run/state/step-6/state.json").unlink()
    (tmp_path / "empty/state").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    assert command(["export", str(tmp_path / path), "--to", str(tmp_path / to)]) == code
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())
