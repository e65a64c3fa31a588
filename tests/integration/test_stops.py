"""Runs that are stopped, doubled, or lose their screen: what they keep, say and return."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, Workspace
from transformers import PreTrainedTokenizerFast

import evaluate
import train
from distilllens import dev_evaluation, session
from distilllens.__main__ import main as command_main
from distilllens.config import DataConfig, EvalConfig
from distilllens.data import tokenize
from distilllens.data.records import read_records
from distilllens.data.tokenize import prepare_dataset
from distilllens.errors import ConfigError, StorageError
from distilllens.evaluation import generation
from distilllens.evaluation.protocol import evaluate_dev_generations
from distilllens.models import load_model, load_tokenizer
from distilllens.runs import RunFolder, read_status
from distilllens.runtime.lock import locked
from distilllens.runtime.signals import Request, Stopped, StopRequest
from distilllens.tracking import Tracker, trim_metrics

SECRET = "aV3ry5ecretValue"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


def signal_in_call(
    count: int, number: int, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> list[int]:
    """Sends this process a signal in the ``count``-th call of a function; returns the calls."""
    calls: list[int] = []
    real = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            signal.raise_signal(number)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, call)
    return calls


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- Tokenising ---------------------------------------------------------------------------------


def test_sigterm_while_tokenising_ends_within_a_batch_and_leaves_nothing_half_written(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenize, "CHUNK_RECORDS", 10)
    flags = workspace.flags("--optim.max_steps", "2")
    with monkeypatch.context() as patch:
        calls = signal_in_call(2, signal.SIGTERM, patch, tokenize, "encode_prompts")
        assert train.main(flags) == 143
    assert len(calls) == 2  # of 6
    error = capsys.readouterr().err
    assert "SIGTERM: stopped while tokenising; nothing was written" in error
    assert "resume with: python train.py --model.student" in error and "Traceback" not in error
    assert not [path for path in workspace.root.iterdir() if "tokens" in path.name]
    status = read_status(RunFolder(workspace.root / "run"))
    assert (status["state"], status["code"], status["exit"]) == ("stopped", 143, "DL-STOPPED")
    assert status["step"] == 0 and status["last_checkpoint"] is None
    assert train.main(flags) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (None, 1)])
def test_a_process_whose_tokenising_one_has_left_ends_as_it_was_asked_to(
    number: int | None,
    code: int,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wait_in_vain(_: object) -> None:
        if number is not None:
            signal.raise_signal(number)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(session, "load_data", wait_in_vain)
    assert train.main(workspace.flags()) == code
    error = capsys.readouterr().err
    assert ("Connection closed" in error) == (number is None)


def test_the_prepare_command_stops_too_and_keeps_the_old_data(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def prepare(max_length: int) -> None:
        data = DataConfig(
            path=str(workspace.root / "data/toy"),
            processed=str(workspace.root / "tokens"),
            max_length=max_length,
            max_prompt_length=100,
        )
        prepare_dataset(data=data, dev_size=12, tokenizer=tiny_tokenizer, family="gpt2")

    prepare(120)
    before = contents(workspace.root)
    with monkeypatch.context() as patch:
        signal_in_call(1, signal.SIGINT, patch, tokenize, "encode_prompts")
        with pytest.raises(Stopped, match="SIGINT: stopped while tokenising") as caught:
            prepare(110)
    assert caught.value.exit_code == 130 and contents(workspace.root) == before
    prepare(110)
    assert contents(workspace.root) != before


# --- Evaluation ---------------------------------------------------------------------------------


def test_a_stopped_evaluation_keeps_finished_cells_and_goes_on(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workspace.root
    flags = ["--checkpoint", f"{root}/student", "--data_dir", f"{root}/data", "--sets", "[toy]"]
    flags += ["--eval.batch_size", "4", "--eval.max_new_tokens", "4", "--max_prompt_length", "110"]
    flags += ["--eval.seeds", "[1, 2]"]
    assert evaluate.main([*flags, "--output_dir", f"{root}/straight"]) == 0
    with monkeypatch.context() as patch:
        calls = signal_in_call(12, signal.SIGTERM, patch, generation, "decode_answer")
        assert evaluate.main([*flags, "--output_dir", f"{root}/out"]) == 143
    assert len(calls) == 12  # 10 answers in each of the 2 cells
    error = capsys.readouterr().err
    assert "SIGTERM: stopped while answering toy seed 2 (2/2); what is answered is kept" in error
    assert [path.parent.parent.name for path in root.glob("out/*/*/results.json")] == ["seed1"]
    assert evaluate.main([*flags, "--output_dir", f"{root}/out"]) == 0
    for seed in ("seed1", "seed2"):
        samples = [root / name / seed / "toy/samples.jsonl" for name in ("straight", "out")]
        assert samples[0].read_text() == samples[1].read_text()


def dev_generations(root: Path, stop: StopRequest, *, rank: int = 0, world_size: int = 1) -> None:
    evaluate_dev_generations(
        load_model(str(root / "student")),
        load_tokenizer(str(root / "student")),
        read_records(root / "data/toy/valid.jsonl").records[:5],
        settings=EvalConfig(max_new_tokens=4, batch_size=2),
        seed=10,
        max_prompt_length=110,
        rank=rank,
        world_size=world_size,
        stop=stop,
    )


def test_generation_in_training_ends_after_the_batch(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = signal_in_call(3, signal.SIGTERM, monkeypatch, generation, "decode_answer")
    stop = StopRequest()
    with stop.listening(), pytest.raises(Stopped, match="stopped while answering dev prompts"):
        dev_generations(workspace.root, stop)
    assert len(calls) == 4  # of 5; asked after every second one


# --- Training -----------------------------------------------------------------------------------


def test_status_tells_how_a_stopped_and_a_finished_run_stand(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(workspace.root / "run")
    flags = workspace.flags("--optim.max_steps", "4", "--eval.every", "2")
    with monkeypatch.context() as patch:
        signal_in_call(3, signal.SIGTERM, patch, Tracker, "advance")
        assert train.main(flags) == 143
    status = read_status(run)
    assert (status["state"], status["exit"], status["code"]) == ("stopped", "DL-STOPPED", 143)
    assert (status["step"], status["last_checkpoint"]) == (3, str(run.state / "step-3"))
    assert status["resume_command"].startswith("python train.py --model.student ")
    assert "SIGTERM: saved step 3" in status["error"]
    assert run.lock.read_bytes() == b""  # released
    assert train.main(flags) == 0
    status = read_status(run)
    assert (status["state"], status["exit"], status["code"]) == ("finished", "done", 0)
    assert status["step"] == 4 and "error" not in status


T2, T4 = '{"step": 2, "train/loss": 1}\n', '{"step": 4, "train/loss": 1}\n'
E2 = '{"step": 2, "eval/dev/loss": 1}\n'


@pytest.mark.parametrize(
    ("content", "step", "kept"),
    [
        (T2 + E2 + T4, 2, 2),
        (T2 + T4, 4, 2),
        (T2 + T4 + E2.replace("2", "4"), 4, 2),  # evaluated after the save
        (T2 + T4, 0, 0),
        (T2 + T4[:8], 4, 1),
        (T2 + T4[:-1], 4, 1),  # killed before the end of the line
        (T2 + "\x00\x00\x00", 4, 1),
        ("", 4, 0),
    ],
)
def test_metrics_after_the_resumed_step_are_cut_off_under_an_open_tracker(
    content: str, step: int, kept: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with path.open("a") as tracker:
        trim_metrics(path, step, evaluated_step=min(step, 2))
        tracker.write("new\n")
    assert path.read_text().splitlines() == [*content.splitlines()[:kept], "new"]


def touch_save_now(run: Path) -> None:
    (run / "save.now").touch()


def send_sigusr1(_: Path) -> None:
    signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize("ask_for_it", [touch_save_now, send_sigusr1])
def test_a_run_that_is_asked_to_saves_and_goes_on(
    ask_for_it: Callable[[Path], None],
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunFolder(workspace.root / "run")
    advance, steps = Tracker.advance, iter(range(1, 100))

    def advance_and_ask(self: Tracker, now: int) -> None:
        advance(self, now)
        if next(steps) == 3:
            ask_for_it(run.root)

    monkeypatch.setattr(Tracker, "advance", advance_and_ask)
    assert train.main(workspace.flags("--optim.max_steps", "5", "--eval.every", "5")) == 0
    assert capsys.readouterr().out.count("saved step 3, as asked") == 1
    assert {path.name for path in run.state.iterdir()} == {"step-3", "step-5"}
    assert not run.save_now.exists()


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("generated", [False, True])
def test_sigterm_in_the_dev_evaluation_ends_within_a_batch_and_loses_no_metrics(
    step: int,
    generated: bool,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The evaluations of steps 2 and 4 have 3 batches each; the last step's is done again too."""
    flags = ["--optim.max_steps", "4", "--eval.every", "2", "--tracking.log_every", "1"]
    flags += ["--eval.max_new_tokens", "4", "--data.max_prompt_length", "110"]
    flags += ["--eval.metric", "rougeL" if generated else "loss"]
    assert train.main(workspace.flags(*flags, out="straight")) == 0
    place = (generation, "decode_answer") if generated else (dev_evaluation, "collate_columns")
    # 12 answers, or 3 batches, in each evaluation: after the second batch of the last.
    count = 12 * (step // 2) - 2 if generated else 3 * (step // 2) - 1
    with monkeypatch.context() as patch:
        calls = signal_in_call(count, signal.SIGTERM, patch, *place)
        assert train.main(workspace.flags(*flags)) == 143
    assert len(calls) == count
    assert f"SIGTERM: saved step {step}" in capsys.readouterr().err
    assert train.main(workspace.flags(*flags)) == 0
    told = []
    for name in ("straight", "run"):
        lines = [json.loads(x) for x in RunFolder(workspace.root / name).metrics.open()]
        timed = ("time", "perf/")
        told.append([{k: v for k, v in x.items() if not k.startswith(timed)} for x in lines])
    assert told[0] == told[1]
    exported = [workspace.root / name / "best/model.safetensors" for name in ("straight", "run")]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_what_a_run_says_is_logged_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN", SECRET)
    files = (tmp_path / "metrics.jsonl", tmp_path / "log.txt")
    with Tracker(*files, active=True, total_steps=1) as tracker:
        tracker.say(f"from https://host/{SECRET}")
    assert files[1].read_text() == "from https://host/[redacted]\n"


def test_every_command_tells_a_users_error_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("prepare", "skills"):
        assert command_main([command, "--nosuch", "1"]) == 2, command
        error = capsys.readouterr().err
        assert error.startswith("error[DL-CONFIG]") and "Traceback" not in error

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distilllens.cli.skills.skills_main", interrupt)
    assert command_main(["skills"]) == 130


def test_ctrl_c_before_anything_began_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distilllens.cli.train.load_config", interrupt)
        assert train.main([]) == 130
    error = capsys.readouterr().err
    assert "interrupted; the same command" in error and "Traceback" not in error
    monkeypatch.setattr(session, "plan_run", interrupt)
    assert train.main(["--model.teacher", "gone", "--run.output_dir", str(tmp_path / "run")]) == 130
    error = capsys.readouterr().err
    assert "SIGINT: stopped before the start" in error and "Traceback" not in error


def test_two_runs_in_one_folder_the_second_is_refused_and_changes_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = workspace.flags("--optim.max_steps", "2")
    run = RunFolder(workspace.root / "run")
    run.root.mkdir()
    run.status.write_text('{"state": "running"}')
    with locked(run.lock):
        before = contents(workspace.root)
        assert train.main(flags) == 2
        assert contents(workspace.root) == before
    error = capsys.readouterr().err
    assert f"in use by pid {os.getpid()} on host {socket.gethostname()} since 20" in error


def test_the_lock_of_a_killed_run_is_taken_over_and_said_so(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(workspace.root / "run")
    run.root.mkdir()
    run.status.write_text('{"state": "running", "st')  # cut off by a power failure
    run.lock.write_text('{"pid": 99, "host": "h", "since": "2026-01-01T00:00:00+0000"}')
    assert train.main(workspace.flags("--optim.max_steps", "1")) == 0
    told = "lock taken over from pid 99 on host h since 2026-01-01T00:00:00+0000"
    assert told in capsys.readouterr().out and told in run.log.read_text()
    assert run.lock.read_bytes() == b""


def test_the_first_process_that_fails_tells_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HUB_TOKEN", SECRET)
    for rank in ("3", "1"):
        monkeypatch.setenv("RANK", rank)
        error = RuntimeError(f"lost {SECRET} by {rank}")
        assert session._end(RunFolder(tmp_path), error, debug=False) == 1
        told = "rank 3: error[DL-BUG]: RuntimeError: lost [redacted] by 3" if rank == "3" else ""
        assert capsys.readouterr().err.partition("\n")[0] == told
        log = (tmp_path / f"log-rank{rank}.txt").read_text()
        assert "Traceback" in log or f"by {rank}" in log
        assert SECRET not in log
    assert "by 3" in read_status(RunFolder(tmp_path))["error"]


def test_a_full_disk_at_the_end_still_gives_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "status.json")

    monkeypatch.setattr(session, "write_status", no_space)
    assert session._end(RunFolder(tmp_path), StorageError("full"), debug=False) == 6
    error = capsys.readouterr().err
    assert "error[DL-STORAGE]: full" in error and "No space left" in error


def test_no_file_of_a_run_holds_the_secrets_of_the_environment(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    run = workspace.root / "run"
    # In the name of a folder that is missing, it comes into message, traceback, command and log.
    missing = ("--model.teacher", f"{workspace.root}/gone-{SECRET}")
    assert train.main(workspace.flags(*missing)) == 2
    assert "gone-[redacted]" in capsys.readouterr().err
    assert train.main(workspace.flags("--optim.max_steps", "1")) == 0
    environment = json.loads((run / "environment.json").read_text())["environment"]
    assert environment["HF_TOKEN"] == "[redacted]" and environment["NCCL_DEBUG"] == "WARN"
    files = contents(run)
    assert len(files) > 15 and not [name for name, (_, b) in files.items() if SECRET.encode() in b]


# --- Processes ----------------------------------------------------------------------------------


def start(flags: list[str], **options: Any) -> subprocess.Popen[bytes]:
    taken = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by this process
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment |= options.pop("env", {})
    command = [*options.pop("before", ()), sys.executable, "train.py", *flags]
    return subprocess.Popen(command, cwd=PROJECT, env=environment, **options)


def test_a_run_outlives_its_screen(workspace: Workspace) -> None:
    """Nobody reads stdout, and stderr is closed: `train.py 2>&- | true`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    flags = workspace.flags("--optim.max_steps", "2")
    child = start(flags, before=("sh", "-c", 'exec "$@" 2>&-', "sh"), stdout=write_end)
    os.close(write_end)
    assert child.wait(120) == 0
    run = RunFolder(workspace.root / "run")
    assert read_status(run)["state"] == "finished"
    assert "done: 2 steps" in run.log.read_text()
    for line in run.metrics.read_text().splitlines():
        json.loads(line)  # nothing else went into the file


def test_a_second_run_is_refused_while_the_first_lives_and_goes_on_when_it_is_killed(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(workspace.root / "run")
    flags = workspace.flags("--optim.max_steps", "60", "--eval.every", "10")
    child = start(flags, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(run.state.glob("step-*"))) > 0)
        child.send_signal(signal.SIGSTOP)  # it lives, but shall not finish before the others come
        before = contents(run.root)
        assert train.main(flags) == 2
        assert f"in use by pid {child.pid} on host" in capsys.readouterr().err
        assert contents(run.root) == before
    finally:
        child.kill()
        child.wait()
    assert train.main(flags) == 0
    told = capsys.readouterr().out
    assert f"lock taken over from pid {child.pid} on host" in told and "resuming from step" in told
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    trained = [line["step"] for line in lines if "train/loss" in line]
    evaluated = [line["step"] for line in lines if "eval/dev/loss" in line]
    assert trained == list(range(2, 61, 2)) and evaluated == list(range(10, 61, 10))


def wait_for(condition: Callable[[], bool], seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def read_all(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # what a pseudo-terminal says when its other end is closed
            return
        if not chunk:
            return
        yield chunk


def test_no_color_gets_plain_lines_even_on_a_terminal(workspace: Workspace) -> None:
    terminal, other_end = pty.openpty()
    settings = {"NO_COLOR": "1", "COLUMNS": "40", "TERM": "xterm-256color"}
    flags = workspace.flags("--optim.max_steps", "2")
    child = start(flags, stdout=other_end, stderr=other_end, env=settings)
    os.close(other_end)
    told = b"".join(read_all(terminal)).decode()
    os.close(terminal)
    assert child.wait(120) == 0
    assert "\x1b" not in told and "step 2/2" in told
    controls = [c for c in told if ord(c) < 32 and c not in "\r\n"]
    assert not controls and "\r" not in told.replace("\r\n", "")


def as_rank(rank: int, port: int, folder: str) -> None:
    """One of two processes, of which only one is asked."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    root = Path(folder)
    found: dict[str, Any] = {}
    try:
        with locked(root / "run.lock"):
            pass
    except ConfigError as error:
        found["lock"] = error.exit_code
    stop = StopRequest(save_file=root / "save.now")
    with stop.listening():
        found["saves"] = [int(ask(stop, step, rank, signal.SIGUSR1)) for step in range(4)]
        torch.distributed.barrier()
        if rank == 1:
            (root / "save.now").touch()
        torch.distributed.barrier()
        found["file"] = stop.agreed() is Request.SAVE
        stop.saved(1)
        torch.distributed.barrier()
        found["file gone"] = not (root / "save.now").exists()
        real, answers = generation.decode_answer, []

        def decode(*arguments: Any, **options: Any) -> Any:
            answers.append(1)
            if rank == 0 and len(answers) == 3:
                signal.raise_signal(signal.SIGTERM)
            return real(*arguments, **options)

        generation.decode_answer = decode
        try:
            dev_generations(root, stop, rank=rank, world_size=2)
        except Stopped as error:
            found["stopped"] = error.exit_code
        found["answers"] = len(answers)
    (root / f"found{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def ask(stop: StopRequest, step: int, rank: int, number: int) -> Request:
    """Asks in each of some steps; process 1 gets a signal before step 2."""
    if rank == 1 and step == 2:
        signal.raise_signal(number)
    if request := stop.agreed():
        stop.saved(step)
    return request


@pytest.mark.slow
def test_two_processes_agree_when_one_is_asked(workspace: Workspace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn: Callable[..., Any] = torch.multiprocessing.spawn
    with locked(workspace.root / "run.lock"):
        spawn(as_rank, args=(port, str(workspace.root)), nprocs=2)
    first, second = (
        json.loads((workspace.root / f"found{rank}.json").read_text()) for rank in range(2)
    )
    # 5 records in batches of 2: process 0 has 2 batches, process 1 has one and still learns.
    assert (first.pop("answers"), second.pop("answers")) == (3, 2)
    assert (
        first
        == second
        == {
            "lock": 2,
            "saves": [0, 0, 1, 0],
            "file": True,
            "file gone": True,
            "stopped": 143,
        }
    )
