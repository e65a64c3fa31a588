"""The scripts that start a run on several machines, with stand-ins for Slurm and for ssh."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_args
from test_scripts import ROOT, Tree, train_configs

TORCHRUN = "scripts/launch/torchrun.sh"
DEEPSPEED = "scripts/launch/deepspeed.sh"
SLURM = "scripts/launch/slurm.sbatch"
KD = "scripts/gpt2/kd/train_all.sh"
HOSTFILES = sorted((ROOT / "configs/hostfiles").iterdir())
FIRST = {"NODE_RANK": "0", "MASTER_ADDR": "node-1"}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    tree = Tree(tmp_path)
    monkeypatch.chdir(tree.root)
    return tree


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def tool(tree: Tree, name: str, *lines: str) -> None:
    """Puts a command of that name first on the scripts' path."""
    path = tree.bin / name
    path.write_text("\n".join(("#!/usr/bin/env bash", *lines)) + "\n")
    path.chmod(0o755)


# --- torchrun -----------------------------------------------------------------------------------


def test_torchrun_starts_a_script_on_this_machine_and_each_run_at_a_port_of_its_own(
    tree: Tree,
) -> None:
    tree.set_gpus(8)
    settings = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "node-1", "GPUS": "8"}
    flags = ["--optim.lr", "1.25e-3"]
    commands = tree.dry_run(TORCHRUN, KD, *flags, TYPES="fkl rkl", HOSTFILE="x", **settings)
    assert [value(command, "--master_port") for command in commands] == ["29500", "29501"]
    for command in commands:
        assert value(command, "--nnodes") == "3" and value(command, "--node_rank") == "2"
        assert value(command, "--nproc_per_node") == "8"
        assert value(command, "--master_addr") == "node-1"
    assert [config.optim.lr for config in train_configs(commands)] == [1.25e-3] * 2
    done = tree.run(TORCHRUN, KD, DRY_RUN="1", **settings)
    assert "24 process(es), gpus=8: an optimizer step takes 24/8" in done.stderr


def test_torchrun_starts_train_itself(tree: Tree) -> None:
    (command,) = tree.dry_run(TORCHRUN, "train.py", "--run.output_dir", "two words", **FIRST)
    assert command[-3:] == ["train.py", "--run.output_dir", "two words"]


@pytest.mark.parametrize("verb", ["generate", "cache-teacher"])
def test_torchrun_starts_commands_that_work_for_a_training(tree: Tree, verb: str) -> None:
    arguments = [verb, "--config", "configs/base.yaml", "--data.generated", "answers"]
    (command,) = tree.dry_run(TORCHRUN, *arguments, **FIRST)
    assert command[-7:] == ["-m", "distilllens", *arguments]
    assert "--nnodes" in command


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "words"),
    [
        (TORCHRUN, [KD], {}, "NODE_RANK=0 MASTER_ADDR=HOST in front"),
        (TORCHRUN, [], FIRST, "what shall run? one of scripts/gpt2/distill_lens/train_all.sh"),
        (TORCHRUN, ["--optim.lr", "1"], FIRST, "what shall run?"),
        (DEEPSPEED, [KD], {"HOSTFILE": "configs/none"}, "no hostfile configs/none, only: four"),
        (DEEPSPEED, [KD], {"HOSTFILE": str(HOSTFILES[-1])}, "pdsh, which is not here"),
        (DEEPSPEED, [KD], {"HOSTFILE": str(HOSTFILES[-1]), "NODE_RANK": "1"}, "MASTER_ADDR=HOST"),
        (SLURM, [KD], {}, f"this is for Slurm: sbatch scripts/launch/slurm.sbatch {KD}"),
    ],
)
def test_what_is_missing_is_told(
    script: str, arguments: list[str], settings: dict[str, str], words: str, tree: Tree
) -> None:
    done = tree.run(script, *arguments, **settings)
    assert done.returncode == 2
    assert words in done.stderr


# --- DeepSpeed's launcher -----------------------------------------------------------------------


@pytest.mark.parametrize("path", HOSTFILES, ids=lambda path: path.name)
def test_deepspeed_reads_the_hostfiles_as_their_names_say(path: Path) -> None:
    numbers = {"one": 1, "two": 2, "four": 4}
    named = re.fullmatch(r"(\w+)_nodes?_(\d+)gpus", path.name)
    assert named is not None
    slots = list(fetch_hostfile(str(path)).values())
    assert slots == [int(named[2])] * numbers[named[1]]


def test_deepspeed_takes_the_hostfile_and_adds_no_flag_to_ours(tree: Tree) -> None:
    settings = {"HOSTFILE": "configs/hostfiles/two_nodes_8gpus", "OMP_NUM_THREADS": "7"}
    (command,) = tree.dry_run(DEEPSPEED, KD, "--run.name", "two words", TYPES="rkl", **settings)
    assert command[0] == "deepspeed"
    understood = parse_args(command[1:])
    assert understood.hostfile == settings["HOSTFILE"]
    assert understood.no_local_rank and understood.no_python and not understood.no_ssh
    assert understood.user_script == "env"  # variables reach the other machines by it alone
    assert understood.user_args[0] == "OMP_NUM_THREADS=7"
    (config,) = train_configs([understood.user_args])
    assert config.run.name == "two words"
    done = tree.run(DEEPSPEED, KD, DRY_RUN="1", **settings)
    assert "16 process(es), gpus=4" in done.stderr


def test_deepspeed_needs_no_ssh_for_one_machine_or_where_each_is_started(tree: Tree) -> None:
    (command,) = tree.dry_run(DEEPSPEED, KD, TYPES="rkl")
    understood = parse_args(command[1:])
    assert understood.no_ssh and understood.node_rank == 0
    assert understood.master_addr == "127.0.0.1"
    settings = {"HOSTFILE": "configs/hostfiles/two_nodes_8gpus", "NODE_RANK": "1"}
    (command,) = tree.dry_run(DEEPSPEED, KD, TYPES="rkl", MASTER_ADDR="node-1", **settings)
    understood = parse_args(command[1:])
    assert understood.no_ssh and understood.node_rank == 1
    assert understood.master_addr == "node-1"


def test_deepspeed_reaches_the_others_by_pdsh_and_passes_its_code_on(tree: Tree) -> None:
    tool(tree, "ssh", "echo 10.0.0.1")  # the check, and `hostname -I`
    tool(tree, "pdsh", 'printf "%s\\n" "$@" >"$PDSH_LOG"', "exit 5")
    settings = {"HOSTFILE": "configs/hostfiles/two_nodes_8gpus", "PDSH_LOG": str(tree.root / "log")}
    done = tree.run(DEEPSPEED, "train.py", "--run.output_dir", "two words", **settings)
    assert done.returncode == 5, done.stderr
    words = (tree.root / "log").read_text().splitlines()
    assert words[words.index("-w") + 1] == "node-1,node-2"
    for word in ("--master_addr=10.0.0.1", "--no_local_rank", "--no_python", "env"):
        assert word in words
    assert f"cd {tree.root};" in words and words[-1] == '"two words"'


# --- Slurm --------------------------------------------------------------------------------------

SRUN = """
while [[ "$1" == -* ]]; do echo "srun $1" >>"$CALLS"; shift; done
for SLURM_NODEID in 0 1; do SLURM_NODEID=$SLURM_NODEID "$@"; done
exit "$SRUN_CODE"
""".strip().splitlines()
"""The tasks of both machines, one after the other."""
JOB = {
    "SLURM_JOB_ID": "345",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "6",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.fixture
def slurm(tree: Tree) -> Tree:
    """A tree with stand-ins of Slurm's commands; what they are told is in ``calls``."""
    tool(tree, "srun", *SRUN)
    tool(tree, "squeue", 'echo "${STATE:-RUNNING}"')
    lines = ('[[ "$1" != show ]] || printf "node1\\nnode2\\n"', 'echo "scontrol $*" >>"$CALLS"')
    tool(tree, "scontrol", *lines)
    variables = "NODE_RANK NNODES MASTER_ADDR MASTER_PORT GPUS SRUN_CPUS_PER_TASK".split()
    seen = " ".join(f'"{name}=${name}"' for name in variables)
    (tree.root / "task.sh").write_text(f'echo "$*" {seen} >>"$CALLS"\n')
    return tree


def batch(slurm: Tree, code: int, **settings: str) -> tuple[int, list[str], str]:
    """Runs the batch script as Slurm does, from a copy; returns its code, the calls, its words."""
    copy, calls = slurm.root.parent / "slurm_script", slurm.root / "calls"
    copy.write_bytes((slurm.root / SLURM).read_bytes())
    environment = slurm.environment(
        **JOB,
        SLURM_SUBMIT_DIR=str(slurm.root),
        CALLS=str(calls),
        SRUN_CODE=str(code),
        **settings,
    )
    done = subprocess.run(
        ["bash", str(copy), "task.sh", "--run.name", "two words"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert calls.is_file(), done.stderr
    return done.returncode, calls.read_text().splitlines(), done.stderr


def test_slurm_tells_every_machine_its_place_and_where_the_first_is(slurm: Tree) -> None:
    (slurm.root / TORCHRUN).write_text('exec bash "$@"\n')
    code, calls, _ = batch(slurm, 0)
    assert code == 0
    assert calls[0] == "scontrol show hostnames node[1-2]"
    assert "srun --kill-on-bad-exit=0" in calls
    common = "NNODES=2 MASTER_ADDR=node1 MASTER_PORT=30500 GPUS=8 SRUN_CPUS_PER_TASK=6"
    assert calls[-2:] == [f"--run.name two words NODE_RANK={rank} {common}" for rank in (0, 1)]


@pytest.mark.parametrize("code", [75, 143])
def test_slurm_queues_a_job_that_saved_again(code: int, slurm: Tree) -> None:
    left, calls, told = batch(slurm, code, SLURM_RESTART_COUNT="3")
    assert left == code
    assert calls[-1] == "scontrol requeue 345"
    assert "job 345 is queued again" in told


@pytest.mark.parametrize("code", [0, 1, 2, 4, 5, 7, 130, 137])
def test_slurm_queues_nothing_that_ended_or_would_fail_again(code: int, slurm: Tree) -> None:
    left, calls, _ = batch(slurm, code)
    assert left == code
    assert not any("requeue" in call for call in calls)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"STATE": "CANCELLED"}, "job 345 is CANCELLED: not queued again"),
        ({"SLURM_RESTART_COUNT": "50"}, "already queued again 50 times: sbatch the same"),
        ({"SLURM_RESTART_COUNT": "2", "RESTARTS": "2"}, "already queued again 2 times"),
    ],
)
def test_slurm_lets_go_of_a_job_that_was_cancelled_or_gets_nowhere(
    settings: dict[str, str], words: str, slurm: Tree
) -> None:
    left, calls, told = batch(slurm, 143, **settings)
    assert left == 143
    assert words in told
    assert "scontrol requeue 345" not in calls


def test_slurms_sigterm_waits_for_the_save(slurm: Tree) -> None:
    """It goes to the batch shell too, if a job is cancelled or preempted."""
    saves = ('trap "sleep 1; exit 143" TERM', "kill -TERM $PPID $$", "while :; do sleep 0.1; done")
    tool(slurm, "srun", *saves)
    left, calls, _ = batch(slurm, 0)
    assert left == 143
    assert calls[-1] == "scontrol requeue 345"


def test_slurm_dry_run_prints_the_tasks_and_what_the_first_machine_runs(tree: Tree) -> None:
    srun, *commands = tree.dry_run(SLURM, KD, "--run.name", "two words", TYPES="fkl rkl")
    assert srun[0] == "srun" and srun[-3:] == [KD, "--run.name", "two words"]
    assert [config.run.name for config in train_configs(commands)] == ["two words"] * 2
    assert {value(command, "--node_rank") for command in commands} == {"0"}


def test_the_batch_file_asks_slurm_for_what_its_words_promise() -> None:
    lines = (ROOT / SLURM).read_text(encoding="utf-8").splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    for option in ("--requeue", "--ntasks-per-node=1", "--open-mode=append", "--signal=TERM@120"):
        assert option in options
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
