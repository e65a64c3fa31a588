"""What `python -m distilllens doctor` finds, says and returns."""

from __future__ import annotations

import collections
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console

from distilllens.__main__ import main
from distilllens.cli.doctor import doctor_main
from distilllens.commands import doctor
from distilllens.commands.doctor import Finding, examine, show
from distilllens.errors import ConfigError
from distilllens.runs import RunFolder, create_run_folder, write_status
from distilllens.runtime.faults import POINTS
from distilllens.runtime.lock import locked
from distilllens.runtime.manifest import hash_folder, write_manifest

SECRET = "aV3ry5ecretValue"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in an empty folder of a machine without surprises."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**12))
    return tmp_path


def topics(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings}


def run_folder(path: Path, **status: object) -> RunFolder:
    folder = create_run_folder(str(path))
    content = {"state": "running", "code": None, "step": 0, "resume_command": "THE COMMAND"}
    write_status(folder, **{**content, **status})  # type: ignore[arg-type]
    return folder


def commit_state(folder: RunFolder, step: int) -> Path:
    state = folder.state / f"step-{step}"
    state.mkdir(parents=True)
    (state / "weights").write_bytes(bytes(1000))
    write_manifest(state, hash_folder(state), {"step": step, "world_size": 1})
    return state


def test_a_sound_machine_has_no_problem_and_ends_with_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    *lines, last = told.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "note"}
    assert last.endswith(", problems: 0")
    assert f"torch {torch.__version__}" in told and "deepspeed 0." in told
    for topic in ("python", "back ends", "threads", "memory", "disk", "environment", "hub"):
        assert any(line[8:].startswith(topic) for line in lines), topic
    assert "HF_TOKEN=[redacted]" in told and SECRET not in told
    assert "\x1b" not in told


def test_a_library_that_is_missing_is_a_problem_and_ends_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"python": "3.11", "distilllens": "1", "torch": "2.13", "peft": "not installed"}
    monkeypatch.setattr(doctor, "versions", lambda: dict(found))
    assert doctor_main([]) == 2
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("problem"))
    assert "peft not installed" in line and "→ pip install -r requirements.txt" in line


@pytest.mark.parametrize(("free", "verdict"), [(20e9, "ok"), (5e9, "note"), (0.5e9, "problem")])
def test_the_disk(free: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, free))
    assert topics(list(doctor.check_disk()))["disk"].verdict == verdict


def test_more_threads_than_cores_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    (finding,) = doctor.check_threads()
    assert finding.verdict == "note" and finding.fix.startswith("OMP_NUM_THREADS=")


def test_a_containers_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000000000\n")
    assert "1.5 cores usable" in next(doctor.check_threads()).text
    (memory,) = doctor.check_memory()
    assert memory.verdict == "note" and "limited to 1.0 GB" in memory.text


def test_slurms_end_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert topics(list(doctor.check_environment()))["slurm"].verdict == "problem"
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")  # long ago
    assert topics(list(doctor.check_environment()))["slurm"].verdict == "note"


def test_the_hub_is_asked_only_online(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def model_info(self: object, name: str, timeout: float) -> None:
        asked.append(name)
        raise OSError("no route to the hub\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert next(doctor.check_hub(online=False)).verdict == "ok" and not asked
    finding = next(doctor.check_hub(online=True))
    assert asked and finding.verdict == "note"
    assert finding.text == "not reached: no route to the hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline" in next(doctor.check_hub(online=True)).text and len(asked) == 1


def test_data_and_models_are_counted(tmp_path: Path) -> None:
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "data/toy/raw.jsonl").write_text('{"a": 1}\n\n{"b": 2}')
    (tmp_path / "data/bad").mkdir()
    (tmp_path / "data/bad/valid.jsonl").write_text("")
    for name, weights in (("good", "model.safetensors"), ("pickled", "pytorch_model.bin")):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / weights).write_bytes(bytes(2000))
        (tmp_path / "checkpoints" / name / "config.json").write_text('{"model_type": "gpt2"}')
    told = {(f.text, f.verdict) for f in (*doctor.check_data(), *doctor.check_models())}
    assert ("data/toy/raw.jsonl: 2 lines", "ok") in told
    assert ("data/bad/valid.jsonl: empty", "problem") in told
    assert ("checkpoints/good: gpt2, 2K bytes", "ok") in told
    assert ("checkpoints/pickled: no safetensors", "note") in told


def test_runs_that_are_not_finished_are_told(tmp_path: Path) -> None:
    place = tmp_path / "results/train/gpt2"
    run_folder(place / "done", state="finished", code=0, step=9)
    run_folder(place / "died", step=3)
    run_folder(place / "failed", state="failed", code=5, error="error[DL-NUMERICS]: nan\n  why: x")
    busy = run_folder(place / "busy", step=4)
    with locked(busy.lock):
        first, *others = doctor.check_runs()
    assert first.text == "4 in results/train/, 1 finished"
    told = {Path(f.text.partition(":")[0]).name: f for f in others}
    assert told.keys() == {"died", "failed", "busy"}
    assert "no process holds its lock" in told["died"].text
    assert (told["died"].verdict, told["died"].fix) == ("note", "go on with: THE COMMAND")
    assert told["failed"].text.endswith("failed, step 0, exit code 5 (error[DL-NUMERICS]: nan)")
    assert told["busy"].verdict == "ok"
    assert f"in use by pid {os.getpid()} on host {socket.gethostname()}" in told["busy"].text


def test_a_runs_states_are_verified_byte_by_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", state="stopped", code=143, step=20)
    states = [commit_state(folder, step) for step in (10, 20)]
    assert doctor_main([str(folder.root)]) == 0
    assert capsys.readouterr().out.count("whole, every file verified") == 2
    content = bytearray((states[1] / "weights").read_bytes())
    content[500] ^= 1
    (states[1] / "weights").write_bytes(content)
    assert doctor_main([str(folder.root)]) == 2
    told = capsys.readouterr().out
    (line,) = (x for x in told.splitlines() if x.startswith("problem"))
    assert str(states[1] / "weights") in line and told.count("whole, every file verified") == 1


def test_a_folder_that_is_not_there_or_no_run_is_a_problem(tmp_path: Path) -> None:
    assert doctor_main([str(tmp_path / "gone")]) == 2
    assert doctor_main([str(tmp_path)]) == 2


def test_nothing_is_changed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", state="stopped", code=143)
    commit_state(folder, 10)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    list(examine(folder.root))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_every_fault_point_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--list-fault-points"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(POINTS)
    assert all(POINTS[line.split()[0]] in line for line in lines[:-1])
    assert "DISTILLLENS_FAULT=" in lines[-1] and "KILL" in lines[-1]


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --lsit"):
        doctor_main(["--lsit"])


def test_a_terminal_gets_a_table() -> None:
    console = Console(force_terminal=True, width=80, record=True)
    findings = [
        Finding(topic="disk", text="full [of] data", verdict="problem", fix="free some"),
        Finding(topic="python", text="3.11"),
    ]
    show(findings, console)
    told = console.export_text()
    assert "full [of] data" in told and "→ free some" in told and "│" in told
    assert "ok: 1, notes: 0, problems: 1" in told
