"""Several machines: started by the scripts, here as two loopback addresses with a process each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, Workspace
from safetensors.torch import load_file

from distilllens.errors import DataError, StorageError
from distilllens.runtime import distributed
from distilllens.runtime.nodes import check_shared, refuse_together
from distilllens.session import resume_command
from train import main

HALVES = ("--optim.micro_batch_size", "4")
"""On each of two processes, of the 8 records of the workspace's optimizer step."""
ENDLESS = ("--optim.max_steps", "100000", "--tracking.log_every", "1", "--eval.every", "100000")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machine:
    """One of the machines: a launch script in its own process group, its output in a file."""

    def __init__(self, rank: int, root: Path, log: Path, command: Sequence[str], port: int) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        own = {name: value for name, value in os.environ.items() if name not in ranks}
        own |= {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.2"}
        own |= {"MASTER_PORT": str(port), "PROCESSES": "1", "PATH": path}
        self.log = log.with_name(f"machine-{rank}.txt")
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                ["bash", *command],
                cwd=root,
                env=own,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def descendants(self) -> list[int]:
        """Process ids below the script, the script's own last."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            children = Path(f"/proc/{pid}/task/{pid}/children")
            waiting += [int(child) for child in children.read_text().split()]
        return found[::-1]

    def kill(self) -> None:
        """As a machine that loses its power: nothing on it gets to say a word."""
        for pid in self.descendants() if self.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)


Start = Callable[..., list[Machine]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the same command on two machines: ``start("scripts/launch/torchrun.sh", *flags)``."""
    machines: list[Machine] = []

    def start(
        script: str, *flags: str, roots: tuple[Path, Path] = (PROJECT, PROJECT)
    ) -> list[Machine]:
        port = free_port()
        command = [script, "train.py", *flags]
        both = [Machine(n, roots[n], tmp_path / "log", command, port) for n in (0, 1)]
        machines.extend(both)
        return both

    yield start
    for machine in machines:
        machine.kill()
        machine.process.wait()


TORCHRUN, DEEPSPEED = "scripts/launch/torchrun.sh", "scripts/launch/deepspeed.sh"


def codes(machines: list[Machine], within_s: float = 120) -> list[int]:
    return [machine.process.wait(timeout=within_s) for machine in machines]


def told(machines: list[Machine]) -> str:
    return "\n".join(machine.said[-3000:] for machine in machines)


def numbers(run: Path) -> list[dict[str, float]]:
    """Returns the lines of metrics without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.startswith(("time", "perf/"))} for m in lines]


def status(run: Path) -> dict[str, Any]:
    found = json.loads((run / "status.json").read_text())
    assert isinstance(found, dict)
    return found


def wait_for_steps(run: Path, machines: list[Machine]) -> None:
    """Until the run has written a few lines of metrics."""
    metrics, end = run / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < end, told(machines)
        assert all(machine.process.poll() is None for machine in machines), told(machines)
        time.sleep(0.2)


def assert_same_run(one: Path, other: Path) -> None:
    """Up to the order of sums: the same metrics at the same steps, the same weights."""
    left, right = numbers(one), numbers(other)
    assert [line["step"] for line in left] == [line["step"] for line in right]
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    weights, others = (load_file(run / "latest/model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-5)


# --- A run of two machines ----------------------------------------------------------------------


def test_two_machines_train_as_one_process_does(workspace: Workspace, start: Start) -> None:
    machines = start(TORCHRUN, *workspace.flags(*HALVES, out="two"))
    assert main(workspace.flags(out="one")) == 0  # meanwhile
    assert codes(machines) == [0, 0], told(machines)
    assert status(workspace.root / "two")["state"] == "finished"
    assert_same_run(workspace.root / "one", workspace.root / "two")
    record = json.loads((workspace.root / "two/environment.json").read_text())
    assert record["machine"]["world_size"] == 2


@pytest.mark.long
def test_deepspeeds_launcher_without_ssh(
    workspace: Workspace, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = workspace.root / "hosts"
    hosts.write_text("# two machines\n127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    monkeypatch.setenv("HOSTFILE", str(hosts))
    machines = start(DEEPSPEED, *workspace.flags(*HALVES, out="two"))
    assert main(workspace.flags(out="one")) == 0
    assert codes(machines) == [0, 0], told(machines)
    assert_same_run(workspace.root / "one", workspace.root / "two")
    machines = start(DEEPSPEED, *workspace.flags("--optim.lrr", "1"))
    assert codes(machines) == [2, 2], told(machines)
    run = workspace.root / "endless"
    machines = start(DEEPSPEED, *workspace.flags(*HALVES, *ENDLESS, out="endless"))
    wait_for_steps(run, machines)
    machines[1].process.terminate()
    assert codes(machines) == [143, 143], told(machines)
    assert status(run)["code"] == 143 and list((run / "state").iterdir())


@pytest.mark.long
@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_on_one_machine_saves_on_all_and_the_same_commands_go_on(
    asked: int, workspace: Workspace, start: Start
) -> None:
    run, flags = workspace.root / "run", workspace.flags(*HALVES, *ENDLESS)
    machines = start(TORCHRUN, *flags)
    wait_for_steps(run, machines)
    machines[asked].process.terminate()
    assert codes(machines) == [143, 143], told(machines)
    saved = status(run)
    assert (saved["state"], saved["code"]) == ("stopped", 143)
    assert list((run / "state").iterdir()) == [run / f"state/step-{saved['step']}"]
    assert "--nnodes 2 --node_rank NODE_RANK --master_addr 127.0.0.2" in saved["resume_command"]

    machines = start(TORCHRUN, *flags)
    end = time.monotonic() + 90
    while f"resuming from step {saved['step']}" not in machines[0].said:
        assert time.monotonic() < end, told(machines)
        time.sleep(0.2)
    (run / "metrics.jsonl").unlink()  # to see its next lines
    for machine in machines:
        machine.process.terminate()
    assert codes(machines) == [143, 143], told(machines)
    assert status(run)["step"] >= saved["step"]


@pytest.mark.long
@pytest.mark.parametrize("dead", [0, 1])
def test_where_a_machine_dies_the_other_ends_with_a_code_of_its_own(
    dead: int, workspace: Workspace, start: Start
) -> None:
    run = workspace.root / "run"
    machines = start(TORCHRUN, *workspace.flags(*HALVES, *ENDLESS))
    wait_for_steps(run, machines)
    machines[dead].kill()
    (code,) = codes([machines[1 - dead]], within_s=60)
    assert code in (1, 7), told(machines)
    if dead == 1:  # else nobody is left to write it
        assert (status(run)["state"], status(run)["code"]) == ("failed", code)


# --- Folders that are not shared ----------------------------------------------------------------


def own_disks(workspace: Workspace) -> tuple[Path, Path]:
    """Returns two roots of the project; what is written below one is not below the other."""
    roots = workspace.root / "disk0", workspace.root / "disk1"
    for root in roots:
        root.mkdir()
        for name in ("distilllens", "scripts", "configs"):
            (root / name).symlink_to(PROJECT / name)
        (root / "train.py").write_bytes((PROJECT / "train.py").read_bytes())
    return roots


@pytest.mark.long
@pytest.mark.parametrize(
    ("flag", "code", "words"),
    [
        ("--run.output_dir", 6, "rank 1 does not see what rank 0 writes in alone"),
        ("--data.processed", 3, "rank 1 does not find the tokenised data that the first process"),
    ],
)
def test_a_folder_that_only_one_machine_sees(
    flag: str, code: int, words: str, workspace: Workspace, start: Start
) -> None:
    flags = workspace.flags(*HALVES, flag, "alone")
    machines = start(TORCHRUN, *flags, roots=own_disks(workspace))
    assert codes(machines, within_s=60) == [code, code], told(machines)
    for machine in machines:  # each tells it on its own screen
        assert machine.said.count(words) == 1, machine.said
        assert f"fix: {'choose' if code == 6 else 'put'}" in machine.said
    assert code == 6 or "it is not there" in machines[1].said


@pytest.fixture
def rank_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this process the second of two; the first one answers with a number."""

    def answer(number: int) -> None:
        monkeypatch.setattr(distributed, "max_over_hosts", lambda own: max(own, number))

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    return answer


def test_a_run_folder_is_refused_where_the_first_process_cannot_be_seen(
    tmp_path: Path, rank_one: Callable[[int], None]
) -> None:
    rank_one(0xABC)
    with pytest.raises(StorageError, match="a file system that all machines share"):
        check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_process_needs_no_other_to_see_its_folder(tmp_path: Path) -> None:
    check_shared(tmp_path / "is not even there")
    refuse_together("what it made", None)


def test_what_one_process_does_not_find_ends_all(rank_one: Callable[[int], None]) -> None:
    rank_one(0)
    refuse_together("the data", None)
    with pytest.raises(DataError, match=r"rank 1 does not find the data\n  why: on .*: gone"):
        refuse_together("the data", DataError("gone"))
    rank_one(3)
    with pytest.raises(DataError, match=r"rank 3 does not find the data\n  why: .*log-rank3\.txt"):
        refuse_together("the data", None)


def test_the_command_that_goes_on_names_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 16)
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    several = "--nnodes 2 --node_rank NODE_RANK --master_addr node-1 train.py --run.seed 1"
    told = resume_command(["--run.seed", "1"])
    assert told == f"torchrun --nproc_per_node 8 {several}"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_SIZE", "8")  # of DeepSpeed's launcher
    assert resume_command(["--run.seed", "1"]) == told
    monkeypatch.setenv("LOCAL_SIZE", "16")
    assert resume_command([]) == "torchrun --nproc_per_node 16 train.py"
