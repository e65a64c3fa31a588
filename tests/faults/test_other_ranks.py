"""One process of several dies, fails, leaves or hangs: the others end, and say why once."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from conftest import PROJECT, Workspace, write_records

from distilllens.runs import RunFolder, read_status
from distilllens.runtime.faults import VARIABLE

FLAGS = (
    *("--optim.micro_batch_size", "4", "--optim.max_steps", "6"),
    *("--eval.every", "2", "--tracking.log_every", "1"),
)


def start_both(flags: list[str], fault: str) -> list[subprocess.Popen[str]]:
    """Starts two processes of one run, without a launcher that would end one for the other."""
    port = str(free_port())
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, VARIABLE: fault}
    return [
        subprocess.Popen(
            [sys.executable, str(PROJECT / "train.py"), *flags],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("action", "rank", "own_code", "cause"),
    [
        ("RAISE", 1, 7, "rank 1: error[DL-DISTRIBUTED]: rank 1 failed: InjectedFault"),
        ("KILL", 0, -9, "rank 1: error[DL-DISTRIBUTED]: another process has left"),
        pytest.param("KILL", 1, -9, "error[DL-DISTRIBUTED]: another", marks=pytest.mark.long),
        pytest.param("EXIT0", 1, 0, "error[DL-DISTRIBUTED]: another", marks=pytest.mark.long),
        pytest.param("SLEEP:600", 1, 7, "made no step within run.timeout", marks=pytest.mark.long),
    ],
)
def test_the_others_end(
    workspace: Workspace, action: str, rank: int, own_code: int, cause: str
) -> None:
    hangs = action.startswith("SLEEP")
    flags = workspace.flags(*FLAGS, "--run.timeout", "00:00:20" if hangs else "00:05:00")
    processes = start_both(flags, f"step.before_update@3#{rank}={action}")
    bad, other = processes[rank], processes[1 - rank]
    try:
        assert bad.wait(180) == own_code
        begin = time.monotonic()
        errors = [other.communicate(timeout=180)[1]]
        assert time.monotonic() - begin < 30
    finally:
        for process in processes:
            process.kill()
    errors.append(bad.communicate()[1])
    assert other.returncode == 7
    told = [line for text in errors for line in text.splitlines() if "error[" in line]
    assert len(told) == 1 and cause in told[0], errors
    run = RunFolder(workspace.root / "run")
    status = read_status(run)
    assert (status["state"], status["exit"], status["code"]) == ("failed", "DL-DISTRIBUTED", 7)
    assert status["step"] == 2 and status["last_checkpoint"] == str(run.state / "step-2")
    log = run.rank_log(1 - rank).read_text()
    assert ("in train_step" if hangs else "another process has left") in log


def test_a_bad_number_of_one_rank_is_told_by_all_with_its_records(workspace: Workspace) -> None:
    write_records(workspace.root / "data/toy/raw.jsonl", 60)
    processes = start_both(workspace.flags(*FLAGS), "step.gradient@3#1=NAN")
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [5, 5]
    assert "error[" not in errors[1]
    found = re.search(
        r"non-finite gradient at step 3 \(loss=\d.*\); rank 1, records ([\d, ]+)\n", errors[0]
    )
    assert found, errors[0]
    run = RunFolder(workspace.root / "run")
    dumped = json.loads(run.bad_batch(3, 1).read_text())
    assert not run.bad_batch(3, 0).exists()
    assert dumped["records"] == [int(number) for number in found[1].split(",")]
    assert len(dumped["texts"]) == 4 and all(
        prompt.startswith("Below is") for prompt, _ in dumped["texts"]
    )
    assert dumped["gradients"] and dumped["sums"][0][1] > 0
    assert read_status(run)["code"] == 5


def test_broken_records_are_told_once_and_keep_their_code(workspace: Workspace) -> None:
    """Only the first process reads them; the other learns of it and does not talk of itself."""
    with (workspace.root / "data/toy/raw.jsonl").open("a") as records:
        records.write("not JSON\n")
    processes = start_both(workspace.flags(*FLAGS), "")
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [3, 3]
    assert errors[0].count("error[") == 1 and "raw.jsonl:61: invalid JSON" in errors[0]
    assert "error[" not in errors[1]
    status = read_status(RunFolder(workspace.root / "run"))
    assert (status["exit"], status["code"]) == ("DL-DATA", 3)


def test_a_full_disk_in_one_ranks_evaluation_is_told_by_that_rank(workspace: Workspace) -> None:
    processes = start_both(workspace.flags(*FLAGS), "evaluate.start@2#1=ENOSPC")
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [7, 6]
    assert "rank 1: error[DL-STORAGE]: no space left" in errors[1] and "error[" not in errors[0]
    run = RunFolder(workspace.root / "run")
    status = read_status(run)
    assert (status["exit"], status["code"], status["step"]) == ("DL-STORAGE", 6, 2)
    assert status["last_checkpoint"] == str(run.state / "step-2")


EVALUATING = """
import sys
from datetime import timedelta
from distilllens.errors import UserError
from distilllens.evaluation.cells.shares import on_all_ranks
from distilllens.evaluation.protocol import process_group
from distilllens.runtime import distributed
distributed.TIMEOUT = timedelta(seconds=float(sys.argv[1]))
try:
    with process_group() as (rank, world_size):
        on_all_ranks(lambda: print(rank, world_size, flush=True))
        sys.stdin.read()
        on_all_ranks(lambda: None)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start_rank(rank: int, port: int, seconds: float) -> subprocess.Popen[str]:
    """Starts a process of an evaluation that goes on when its input ends."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", EVALUATING, str(seconds)],
        env={**os.environ, **group, "RANK": str(rank)},
        cwd=PROJECT,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_evaluation_waits_for_a_rank_that_never_comes() -> None:
    rank = start_rank(0, free_port(), 2)
    _, error = rank.communicate(timeout=120)
    assert rank.returncode == 7
    assert "error[DL-DISTRIBUTED]: rank 0 of 2 could not join at 127.0.0.1:" in error


@pytest.mark.parametrize("dead", [0, pytest.param(1, marks=pytest.mark.long)])
def test_no_evaluation_waits_for_a_rank_that_was_killed(dead: int) -> None:
    port = free_port()
    ranks = [start_rank(rank, port, 60) for rank in range(2)]
    outputs = [rank.stdout.readline() if rank.stdout else "" for rank in ranks]
    assert outputs == ["0 2\n", "1 2\n"]
    other = ranks[1 - dead]
    assert other.stdin is not None
    other.stdin.close()  # it goes on, to the next meeting
    time.sleep(0.5)
    assert other.poll() is None
    ranks[dead].kill()
    assert other.wait(timeout=60) == 7
    assert other.stderr is not None and "another process has left" in other.stderr.read()
    ranks[dead].wait()


@pytest.mark.long
def test_a_slow_rank_is_waited_for_longer_than_one_that_never_came() -> None:
    port = free_port()
    ranks = [start_rank(rank, port, 3) for rank in range(2)]
    assert [rank.stdout.readline() if rank.stdout else "" for rank in ranks] == ["0 2\n", "1 2\n"]
    early, late = ranks
    assert early.stdin is not None
    early.stdin.close()
    time.sleep(5)
    assert early.poll() is None
    assert late.communicate(timeout=60)[1] == ""
    assert [early.wait(timeout=60), late.returncode] == [0, 0]
