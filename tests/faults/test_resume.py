"""A run that was interrupted ends as the one that was not, to the bit; or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, Workspace, add_dropout, stop_at
from safetensors.torch import load_file

from distilllens import checkpoint
from distilllens.__main__ import main as command
from distilllens.checkpoint import TrainState
from distilllens.dev_evaluation import DevEvaluation
from distilllens.runs import RunFolder
from distilllens.runtime.faults import VARIABLE
from distilllens.runtime.manifest import read_manifest
from distilllens.trainer import Trainer
from distilllens.training.resume import find_state
from distilllens.training.totals import Totals
from train import main

WORKER = Path(__file__).with_name("resume_worker.py")
STEPS = ("--optim.max_steps", "9", "--tracking.log_every", "3")
"""6 steps are an epoch; some stops below lie between two lines of metrics."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def numbers(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.startswith(("time", "perf/"))} for m in lines]


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended bit-equal: last and best weights, and every line of metrics."""
    if numbers(one) != numbers(other):
        return False
    for name in ("latest", "best"):
        left, right = weights(one / name), weights(other / name)
        if left.keys() != right.keys() or any(not torch.equal(left[n], right[n]) for n in left):
            return False
    return True


def stopped(workspace: Workspace, step: int, *flags: str, out: str = "run") -> Path:
    """Trains until a signal comes after ``step``."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(step, patch)
        assert main(workspace.flags(*flags, out=out)) == 128 + signal.SIGTERM
    return workspace.root / out


def own_environment() -> dict[str, str]:
    """Returns this process's variables without those of its process group."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in group}


# --- One process --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage_resumes_bit_equal_and_exports(workspace: Workspace, stage: int) -> None:
    """Stage 1: tests/integration/test_train.py, over an epoch's end and with a second resume."""
    add_dropout(workspace)
    flags = (*STEPS, "--deepspeed", workspace.deepspeed(stage))
    assert main(workspace.flags(*flags, out="straight")) == 0
    run = stopped(workspace, 4, *flags)
    student = workspace.root / "at-4"
    assert command(["export", str(run / "state/step-4"), "--to", str(student)]) == 0
    assert main(workspace.flags(*flags)) == 0
    assert same(workspace.root / "straight", run)
    assert command(["export", str(run), "--to", str(workspace.root / "last")]) == 0
    exported, latest = weights(workspace.root / "last"), weights(run / "latest")
    assert exported.keys() == latest.keys() == weights(student).keys()
    assert all(torch.equal(exported[name], latest[name]) for name in latest)
    assert any(not torch.equal(weights(student)[name], latest[name]) for name in latest)


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_resume_bit_equal_and_export_merged(workspace: Workspace, stage: int) -> None:
    flags = (
        *("--model.student_lora.r", "2", "--model.student_lora.dropout", "0.1"),
        *("--optim.lr", "1e-2", "--optim.max_steps", "4", "--tracking.log_every", "1"),
        *("--deepspeed", workspace.deepspeed(stage)),
    )
    assert main(workspace.flags(*flags, out="straight")) == 0
    run = stopped(workspace, 2, *flags)
    assert main(workspace.flags(*flags)) == 0
    assert same(workspace.root / "straight", run)
    assert command(["export", str(run), "--to", str(workspace.root / "last")]) == 0
    exported, before = weights(workspace.root / "last"), weights(workspace.root / "student")
    assert exported.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], exported[name])}
    assert changed and all(".attn." in name or ".mlp." in name for name in changed)


def forget_optimizer(patch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load_state

    def forgetful(engine: Any, *arguments: Any, **options: Any) -> Any:
        loaded = load(engine, *arguments, **options)
        for values in engine.optimizer.optimizer.state.values():
            values["exp_avg_sq"].zero_()
        return loaded

    patch.setattr("distilllens.keeper.load_state", forgetful)


def forget_random_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "set_random_state", lambda *_: None)


def forget_offset(patch: pytest.MonkeyPatch) -> None:
    epoch = Trainer.epoch

    def from_the_start(self: Trainer) -> Iterator[Any]:
        step, self.state.step = self.state.step, 0
        batches = epoch(self)
        first = next(batches)
        self.state.step = step
        yield first
        yield from batches

    patch.setattr(Trainer, "epoch", from_the_start)


def forget_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Totals, "add", lambda *_: None)


def forget_best(patch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load_state

    def forgetful(*arguments: Any, **options: Any) -> Any:
        state, sums = load(*arguments, **options)
        return TrainState(step=state.step), sums

    patch.setattr("distilllens.keeper.load_state", forgetful)


def test_without_one_part_the_run_is_not_bit_equal(workspace: Workspace) -> None:
    """Controls: the tests above can fail, and each part of a state is needed."""
    add_dropout(workspace)
    flags = ("--optim.max_steps", "4", "--tracking.log_every", "4")
    assert main(workspace.flags(*flags, out="straight")) == 0
    run = stopped(workspace, 2, *flags)
    outcomes = {}
    mutations: list[Callable[[pytest.MonkeyPatch], None]] = [
        *(lambda _: None, forget_optimizer, forget_random_state, forget_offset, forget_sums)
    ]
    for number, mutate in enumerate(mutations):
        shutil.copytree(run, workspace.root / str(number))
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch)
            assert main(workspace.flags(*flags, out=str(number))) == 0
        outcomes[mutate.__name__] = same(workspace.root / "straight", workspace.root / str(number))
    assert outcomes == {
        "<lambda>": True,
        "forget_optimizer": False,
        "forget_random_state": False,
        "forget_offset": False,
        "forget_sums": False,
    }


def test_sums_of_a_program_with_fewer_counters_begin_anew(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line after the resume is then of the steps since; the training is the same."""
    flags = ("--optim.max_steps", "4", "--tracking.log_every", "4")
    assert main(workspace.flags(*flags, "--tracking.log_every", "2", out="straight")) == 0
    run = stopped(workspace, 2, *flags)
    load = checkpoint.load_state

    def older(*arguments: Any, **options: Any) -> Any:
        state, sums = load(*arguments, **options)
        return state, [{**own, "counts": own["counts"][:2]} for own in sums]

    monkeypatch.setattr("distilllens.keeper.load_state", older)
    assert main(workspace.flags(*flags)) == 0
    assert numbers(run)[-2] == numbers(workspace.root / "straight")[-2]
    assert numbers(run)[-2]["step"] == 4 and "train/loss" in numbers(run)[-2]
    assert all(
        torch.equal(w, weights(run / "latest")[n])
        for n, w in weights(workspace.root / "straight/latest").items()
    )


def test_the_best_is_remembered(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DevEvaluation, "_loss", lambda dev: float(dev.engine.global_steps))
    flags = ("--eval.every", "2", "--optim.max_steps", "4", "--tracking.log_every", "1")
    assert main(workspace.flags(*flags, out="straight")) == 0
    run = stopped(workspace, 3, *flags)
    shutil.copytree(run, workspace.root / "forgetful")
    assert main(workspace.flags(*flags)) == 0
    assert same(workspace.root / "straight", run)
    forget_best(monkeypatch)
    assert main(workspace.flags(*flags, out="forgetful")) == 0
    assert not same(workspace.root / "straight", workspace.root / "forgetful")


def test_killed_twice_and_started_again(workspace: Workspace) -> None:
    """By SIGKILL, inside a save and in a step."""
    flags = workspace.flags("--tracking.log_every", "1", "--eval.every", "2")
    assert main([*flags, "--run.output_dir", str(workspace.root / "straight")]) == 0
    for point in ("save.after_manifest@4=KILL", "step.before_update@6=KILL"):
        done = subprocess.run(
            [sys.executable, str(PROJECT / "train.py"), *flags],
            env={**own_environment(), VARIABLE: point},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(flags) == 0
    assert same(workspace.root / "straight", workspace.root / "run")


def test_faults_between_the_saves(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other in one run; each time the same command goes on."""
    flags = workspace.flags("--tracking.log_every", "1", "--eval.every", "2")
    assert main([*flags, "--run.output_dir", str(workspace.root / "straight")]) == 0
    for fault, code in (
        ("step.before_update@1=RAISE", 1),
        ("evaluate.start@2=RAISE", 1),
        ("evaluate.after_dev@2=EIO", 1),
        ("evaluate.after_latest@4=RAISE", 1),
        ("resume.start=RAISE", 1),
        ("resume.verified=RAISE", 1),
        ("resume.loaded=RAISE", 1),
        ("step.loss@5=NAN", 5),
        ("step.gradient@5=NAN", 5),
        ("step.after_update@5=RAISE", 1),
        ("replace.between=ENOSPC", 6),
        ("evaluate.end@6=RAISE", 1),
        ("save.starts=RAISE", 2),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, fault)
            assert main(flags) == code, fault
        error = capsys.readouterr().err
        kind = "gradient" if "gradient" in fault else "loss"
        assert f"non-finite {kind} at step 5" in error or code != 5
    assert main(flags) == 0
    assert same(workspace.root / "straight", workspace.root / "run")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(
    workspace: Workspace,
    stage: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss is finite; two micro-batches, of which the first is bad."""
    flags = workspace.flags(
        *("--optim.max_steps", "3", "--tracking.log_every", "1", "--eval.every", "2"),
        *("--optim.micro_batch_size", "4", "--optim.accumulation", "2"),
        *("--deepspeed", workspace.deepspeed(stage)),
    )
    assert main([*flags, "--run.output_dir", str(workspace.root / "straight")]) == 0
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "step.gradient@3=NAN")
        assert main(flags) == 5
    error = capsys.readouterr().err
    assert "non-finite gradient at step 3 (loss=" in error and "nan" not in error.split("\n")[0]
    run = RunFolder(workspace.root / "run")
    dumped = json.loads(run.bad_batch(3, 0).read_text())
    assert len(dumped["records"]) == len(dumped["texts"]) == 8 and len(dumped["input_ids"]) == 2
    assert len(dumped["gradients"]) > 10 and f"kept: {run.state}/step-2" in error
    assert main(flags) == 0
    assert same(workspace.root / "straight", run.root)


def test_changed_options_and_data_go_on_only_if_asked(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--optim.max_steps", "4", "--tracking.log_every", "1")
    run = stopped(workspace, 2, *flags)
    changed = (*flags, "--optim.lr", "2e-3", "--objective.lens.count", "1")
    with (workspace.root / "data/toy/raw.jsonl").open("a") as records:
        records.write('{"instruction": "Sort: a", "input": "", "output": "a"}\n')
    allowed = ("--run.allow_changes", "true")
    assert main(workspace.flags(*changed)) == 4
    error = capsys.readouterr().err
    assert "optim.lr              0.001 → 0.002" in error and "--run.allow_changes true" in error
    assert main(workspace.flags(*flags)) == 4
    assert "data_fingerprint" in capsys.readouterr().err
    assert main(workspace.flags(*changed, *allowed)) == 0
    told = capsys.readouterr().out
    assert "objective.lens.count  2 → 1" in told and "data_fingerprint" in told
    assert [line["train/lr"] for line in numbers(run) if "train/lr" in line][-2:] != []


def test_going_back_to_an_earlier_state_and_on_from_there(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state of a step that is done again is the new one; the same command does not go back."""
    flags = ("--optim.max_steps", "6", "--tracking.log_every", "1")
    stopped(workspace, 2, *flags)
    run = RunFolder(stopped(workspace, 4, *flags))
    back = (*flags, "--optim.lr", "5e-3", "--run.allow_changes", "true")
    named = ("--run.resume", str(run.state / "step-2"))
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        assert main(workspace.flags(*back, *named)) == 143
    told = capsys.readouterr()
    assert "optim.lr  0.001 → 0.005" in told.out
    assert "resume with: python train.py" in told.err and "--run.resume" not in told.err
    assert (run.state / "before-step-4").is_dir()
    new, old = weights(run.state / "step-4/student"), weights(run.state / "before-step-4/student")
    assert any(not torch.equal(new[name], old[name]) for name in new)
    assert main(workspace.flags(*back, *named)) == 0
    assert "resuming from step 4" in capsys.readouterr().out


def test_changed_decay_and_clipping_hold_after_a_resume(workspace: Workspace) -> None:
    """DeepSpeed brings the old ones back with the optimizer."""
    flags = ("--optim.max_steps", "4", "--tracking.log_every", "1")
    run = stopped(workspace, 2, *flags)
    shutil.copytree(run, workspace.root / "changed")
    assert main(workspace.flags(*flags)) == 0
    changed = (*flags, "--run.allow_changes", "true", "--optim.weight_decay", "100")
    assert main(workspace.flags(*changed, "--optim.clip_grad", "1e-6", out="changed")) == 0
    plain, other = weights(run / "latest"), weights(workspace.root / "changed/latest")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert other[name].norm() < 0.96 * plain[name].norm()  # lr · decay: 5 % and 1.5 %
    bias = "transformer.ln_f.weight"  # not decayed
    assert torch.allclose(other[bias], plain[bias], atol=0.01)


def test_another_precision_is_never_continued(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--optim.max_steps", "4", "--run.allow_changes", "true")
    stopped(workspace, 2, *flags)
    capsys.readouterr()
    bf16 = ("--deepspeed", workspace.deepspeed(1, "bf16"))
    assert main(workspace.flags(*flags, *bf16)) == 4
    error = capsys.readouterr().err
    assert "precision  torch.float32 → torch.bfloat16" in error and "allow_changes" not in error


# --- Damage -------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "zero": lambda _: b"",
    "truncated": lambda content: content[:-1],
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 8]) + content[-8:],
}


def test_any_damage_to_any_file_falls_back_and_says_so(
    workspace: Workspace, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--optim.max_steps", "5", "--tracking.log_every", "1")
    assert main(workspace.flags(*flags, out="straight")) == 0
    stopped(workspace, 2, *flags)
    run = RunFolder(stopped(workspace, 4, *flags))
    newest = run.state / "step-4"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    parts = {file.parts[0] for file in files}
    assert parts == {"deepspeed", "student", "rank-0.safetensors", "state.json", "manifest.json"}
    for file in files:
        content = (newest / file).read_bytes()
        for name, damage in DAMAGES.items():
            damaged = damage(content)
            (newest / file).unlink()
            if damaged is not None:
                (newest / file).write_bytes(damaged)
            caplog.clear()
            assert find_state(run, "auto") == run.state / "step-2", f"{file}: {name}"
            (told,) = (record.message for record in caplog.records)
            assert str(newest / file) in told and "going on from" in told
            (run.state / "damaged-step-4").rename(newest)
            (newest / file).write_bytes(content)
    assert find_state(run, "auto") == newest
    (newest / "state.json").write_bytes(b"")
    assert main(workspace.flags(*flags, "--run.resume", str(newest))) == 4
    assert "state.json has 0 of" in capsys.readouterr().err
    assert main(workspace.flags(*flags)) == 0
    assert "resuming from step 2" in capsys.readouterr().out
    assert same(workspace.root / "straight", run.root)


def test_an_evaluation_that_fails_loses_no_step(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = workspace.flags("--optim.max_steps", "4", "--tracking.log_every", "1")
    assert main([*flags, "--run.output_dir", str(workspace.root / "straight")]) == 0
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "evaluate.after_dev@4=RAISE")
        assert main(flags) == 1
    run = workspace.root / "run"
    told = capsys.readouterr()
    assert "step 4 is saved; to score it: python -m distilllens export" in told.out
    assert find_state(RunFolder(run), "must") == run / "state/step-4"
    assert main(flags) == 0
    assert same(workspace.root / "straight", run)


def test_a_disk_without_room_for_one_save_is_refused_at_the_start(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(workspace.root)
    state_bytes = 900_000  # what this run's state and models take, about
    for free, code in ((state_bytes // 4, 6), (state_bytes * 2, 0), (10**9, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert main(workspace.flags("--optim.max_steps", "1", out=str(free))) == code
        told = capsys.readouterr()
        assert ("error[DL-STORAGE]: no space left for" in told.err) == (code == 6)
        assert ("warning: disk: at most" in told.out) == (free == state_bytes * 2)
    run = workspace.root / str(10**9)
    state = sum(p.stat().st_size for p in (run / "state/step-1").rglob("*") if p.is_file())
    model = (run / "best/model.safetensors").stat().st_size
    assert 0.5 < (state + 2 * model) / state_bytes < 2


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = workspace.flags("--optim.max_steps", "4", "--eval.every", "2")
    for point in ("save.deepspeed_file", "save.after_student"):
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, f"{point}@4=ENOSPC")
            assert main(flags) == 6
        error = capsys.readouterr().err
        assert "error[DL-STORAGE]: no space left: could not write" in error
        assert (
            "GB free)" in error and f"kept: last good: {workspace.root}/run/state/step-2" in error
        )
    assert main(flags) == 0
    assert "resuming from step 2" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two states, not for three; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(
    workspace: Workspace, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(small_disk / "run")
    flags = workspace.flags("--eval.every", "1", "--run.output_dir", str(run.root))
    assert main(flags) == 6
    error = capsys.readouterr().err
    assert "error[DL-STORAGE]: no space left: could not write" in error
    good = find_state(run, "must")
    assert good is not None and f"kept: last good: {good}" in error
    assert command(["export", str(run.root), "--to", str(workspace.root / "last")]) == 0


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(_: object) -> None:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr("distilllens.session.plan_run", plan)


def test_an_output_folder_that_is_a_file_is_refused_before_any_model_loads(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_to_load(monkeypatch)
    (workspace.root / "file").write_text("mine")
    for out in ("file", "file/below", "file/far/below"):
        assert main(workspace.flags(out=out)) == 6
        error = capsys.readouterr().err
        assert "error[DL-STORAGE]" in error and str(workspace.root / "file") in error
    assert (workspace.root / "file").read_text() == "mine"


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_model_loads(
    workspace: Workspace,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse_to_load(monkeypatch)
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in ("run", "new"):
        assert main(workspace.flags("--run.output_dir", str(small_disk / out))) == 6
        assert "error[DL-STORAGE]" in capsys.readouterr().err


# --- Two processes ------------------------------------------------------------------------------


def do_jobs(workspace: Workspace, jobs: list[dict[str, Any]]) -> list[int]:
    """Has two processes do jobs; returns the exit codes, the same for both."""
    jobs_file = workspace.root / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(jobs_file)],
        env={**own_environment(), "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (workspace.root / "output").write_text(done.stdout + done.stderr)
    codes = [json.loads((workspace.root / f"codes-{rank}.json").read_text()) for rank in (0, 1)]
    assert codes[0] == codes[1]
    return [int(code) for code in codes[0]]


def step_lines(run: Path) -> list[tuple[int, float, float, float]]:
    """Returns step, loss, gradient norm, and all tokens by response tokens of each line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (
            *(m["step"], m["train/loss"], m["train/grad_norm"]),
            m["perf/tokens_per_s"] / m["perf/response_tokens_per_s"],
        )
        for m in lines
        if "train/loss" in m
    ]


def test_two_processes(workspace: Workspace) -> None:
    """Bit-equal in epoch 0 and over its end; faults on one rank; other numbers of processes."""
    whole = ("--optim.micro_batch_size", "8")
    half = ("--optim.micro_batch_size", "4")
    plain = (*STEPS, "--deepspeed", workspace.deepspeed(0))
    shutil.copytree(workspace.root / "student", workspace.root / "calm")
    add_dropout(workspace)
    calm = (*plain, "--model.student", str(workspace.root / "calm"))

    def job(*flags: str, out: str, stop_at: int | None = None, fault: str = "") -> dict[str, Any]:
        return {"argv": workspace.flags(*flags, out=out), "stop_at": stop_at, "fault": fault}

    assert main(workspace.flags(*calm, *whole, out="alone")) == 0
    stopped(workspace, 3, *calm, *whole, out="one-to-two")
    codes = do_jobs(
        workspace,
        [
            job(*STEPS, *half, out="straight"),
            job(*STEPS, *half, out="run", stop_at=3),
            job(*STEPS, *half, out="run", stop_at=7, fault="save.deepspeed_file@7#1=ENOSPC"),
            job(*STEPS, *half, out="run"),
            job(*calm, *half, out="one-to-two"),
            job(*calm, *half, out="two-to-one", stop_at=3),
            job(*STEPS, *half, out="shards", stop_at=2),
        ],
    )
    assert codes == [0, 143, 6, 0, 0, 143, 143]
    assert same(workspace.root / "straight", workspace.root / "run")
    state = find_state(RunFolder(workspace.root / "run"), "must")
    assert state is not None
    names = {path.name for path in state.glob("rank-*")}
    assert names == {"rank-0.safetensors", "rank-1.safetensors"}
    assert read_manifest(state)["world_size"] == 2
    assert main(workspace.flags(*STEPS, *whole, out="shards")) == 4  # ZeRO 1
    assert main(workspace.flags(*calm, *half, out="two-to-one")) == 4  # half a global batch
    assert main(workspace.flags(*calm, *half, "--optim.accumulation", "2", out="two-to-one")) == 0
    alone = workspace.root / "alone"
    for out in ("one-to-two", "two-to-one"):
        for name, weight in weights(alone / "latest").items():
            other = weights(workspace.root / out / "latest")[name]
            torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-6)
        for line, wanted in zip(*map(step_lines, (workspace.root / out, alone)), strict=True):
            assert line == pytest.approx(wanted, rel=1e-4)
