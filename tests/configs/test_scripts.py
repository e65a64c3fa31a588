"""Every bash script: clean, dry-runnable, its commands understood by train.py and evaluate.py."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from distilllens.config import EvaluateConfig, TrainConfig, load_config, load_evaluate_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "scripts").rglob("*.sbatch")])
COMMANDS = [path for path in SCRIPTS if path.parent.name not in ("lib", "launch")]
TRAIN = [path for path in COMMANDS if path.name == "train_all.sh"]
EVALUATE = [path for path in COMMANDS if path.name == "run_eval.sh"]
GENERATE = [path for path in COMMANDS if path.name == "generate_data.sh"]
CE_ONLY = ("sft", "seqkd")
SETTINGS = (
    "DRY_RUN GPUS MODEL TYPES SEEDS SETS ALSO APPROACHES CKPT_NAME PROCESSES NNODES NODE_RANK "
    "SEED LIMIT GENERATED MASTER_ADDR MASTER_PORT HOSTFILE RESTARTS SAVE_SECONDS OMP_NUM_THREADS "
    "CUDA_VISIBLE_DEVICES"
).split()
"""Of the environment, read by the scripts: not the tester's."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Tree:
    """A copy of scripts and configs with a faked nvidia-smi, in which scripts can run."""

    def __init__(self, root: Path) -> None:
        self.root = root / "project"
        for name in ("scripts", "configs"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin = root / "bin"
        self.bin.mkdir()
        self.set_gpus(0)

    def set_gpus(self, count: int) -> None:
        lines = "".join(f"echo 'GPU {i}: NVIDIA H200 (UUID: GPU-{i})'\n" for i in range(count))
        tool = self.bin / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{lines}")
        tool.chmod(0o755)

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        path = [str(self.bin), str(Path(sys.executable).parent), os.environ["PATH"]]
        return kept | {"PATH": ":".join(path)} | settings

    def run(self, script: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script, *flags],
            cwd=self.root,
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def dry_run(self, script: str, *flags: str, **settings: str) -> list[list[str]]:
        """Returns the printed commands, split into words as a shell would."""
        done = self.run(script, *flags, DRY_RUN="1", **settings)
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in done.stdout.splitlines()]

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    tree = Tree(tmp_path)
    monkeypatch.chdir(tree.root)
    return tree


@cache
def parse_train(arguments: tuple[str, ...]) -> TrainConfig:
    return load_config(arguments)


def generate_configs(commands: list[list[str]]) -> list[TrainConfig]:
    found = [words for words in commands if "generate" in words]
    return [parse_train(tuple(words[words.index("generate") + 1 :])) for words in found]


@cache
def parse_evaluate(arguments: tuple[str, ...]) -> EvaluateConfig:
    return load_evaluate_config(arguments)


def train_configs(commands: list[list[str]]) -> list[TrainConfig]:
    """Parses the arguments of the train.py commands as train.py does."""
    with_train = [words for words in commands if "train.py" in words]
    return [parse_train(tuple(words[words.index("train.py") + 1 :])) for words in with_train]


def evaluate_configs(commands: list[list[str]]) -> list[EvaluateConfig]:
    found = [words for words in commands if "evaluate.py" in words]
    return [parse_evaluate(tuple(words[words.index("evaluate.py") + 1 :])) for words in found]


def test_shellcheck_is_content() -> None:
    tool = Path(sys.executable).parent / "shellcheck"
    command = str(tool) if tool.exists() else "shellcheck"
    paths = [relative(path) for path in SCRIPTS]
    done = subprocess.run([command, *paths, ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=relative)
def test_script_is_thin_runnable_and_strict(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    if path.parent.name != "lib":
        assert lines[0] == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in lines


@pytest.mark.parametrize("path", COMMANDS, ids=relative)
def test_dry_run_prints_commands_and_makes_nothing(path: Path, tree: Tree) -> None:
    before = tree.files()
    commands = tree.dry_run(relative(path))
    assert commands
    assert tree.files() == before
    train_configs(commands)
    evaluate_configs(commands)
    generate_configs(commands)


@pytest.mark.parametrize("path", TRAIN, ids=relative)
def test_flags_reach_every_training(path: Path, tree: Tree) -> None:
    flags = ["--optim.lr", "1.25e-3", "--run.name", "two words"]
    configs = train_configs(tree.dry_run(relative(path), *flags, SEEDS="1 2", TYPES="rkl"))
    assert len(configs) == 2
    assert {(c.optim.lr, c.run.name) for c in configs} == {(1.25e-3, "two words")}


@pytest.mark.parametrize("path", TRAIN, ids=relative)
def test_training_script_writes_where_its_folder_says(path: Path, tree: Tree) -> None:
    approach = path.parent.name
    types = "ce" if approach in CE_ONLY else "fkl+rkl jsd"
    configs = train_configs(tree.dry_run(relative(path), TYPES=types, CKPT_NAME="mine"))
    assert [c.run.output_dir for c in configs] == [
        f"results/train/mine/{approach}/{type}" for type in types.split()
    ]
    for config in configs:
        assert config.objective.approach == approach
        assert config.model.student == "checkpoints/mine"
        assert approach in CE_ONLY or config.run.output_dir.endswith(config.objective.divergence)


@pytest.mark.parametrize("path", GENERATE, ids=relative)
def test_generated_answers_are_those_that_are_trained_on(path: Path, tree: Tree) -> None:
    """The same folder, teacher, records and dev set in both scripts of a family, for all models."""
    train = relative(path).replace("tools/generate_data.sh", "seqkd/train_all.sh")
    for model in ("base", "medium") if "gpt2" in train else ("",):
        settings = {"MODEL": model} if model else {}
        (made,) = generate_configs(tree.dry_run(relative(path), "--generate.samples", "2"))
        (used,) = train_configs(tree.dry_run(train, **settings))
        assert made.generate.samples == 2
        assert made.data == used.data and made.data.generated
        assert made.data.generated.startswith("data/generated/")  # not in git
        assert (made.model.teacher, made.model.teacher_lora) == (
            used.model.teacher,
            used.model.teacher_lora,
        )
        assert made.eval.dev_size == used.eval.dev_size
        assert used.objective.approach == "seqkd"


def test_generating_runs_on_all_gpus(tree: Tree) -> None:
    tree.set_gpus(4)
    (command,) = tree.dry_run("scripts/gpt2/tools/generate_data.sh")
    start = (
        "torchrun --standalone --nproc_per_node 4 --shutdown_timeout 600 -m distilllens generate"
    )
    assert command[3:12] == start.split()


def test_several_seeds_get_folders_of_their_own(tree: Tree) -> None:
    configs = train_configs(tree.dry_run("scripts/gpt2/distill_lens/train_all.sh", SEEDS="10 20"))
    assert [(c.run.seed, c.run.output_dir) for c in configs] == [
        (10, "results/train/gpt2-base/distill_lens/rkl/seed10"),
        (20, "results/train/gpt2-base/distill_lens/rkl/seed20"),
    ]


def test_kd_runs_all_divergences_of_the_paper(tree: Tree) -> None:
    configs = train_configs(tree.dry_run("scripts/gpt2/kd/train_all.sh"))
    assert [c.objective.divergence for c in configs] == ["fkl", "rkl", "fkl+rkl", "jsd", "akl"]


def test_edited_lines_count(tree: Tree) -> None:
    script = tree.root / "scripts/gpt2/distill_lens/train_all.sh"
    text = script.read_text(encoding="utf-8")
    edited = text.replace('model="${MODEL:-base}"', 'model="medium"')
    script.write_text(edited.replace('gpus="${GPUS:-4}"', "gpus=2"), encoding="utf-8")
    tree.set_gpus(4)
    (command,) = tree.dry_run("scripts/gpt2/distill_lens/train_all.sh")
    assert command[command.index("--nproc_per_node") + 1] == "2"
    (config,) = train_configs([command])
    assert config.model.student == "checkpoints/gpt2-medium"
    assert config.optim.lr == 5e-5


def test_unknown_model_is_named_with_the_choices(tree: Tree) -> None:
    done = tree.run("scripts/gpt2/kd/train_all.sh", MODEL="large")
    assert done.returncode == 2
    assert "configs/models/gpt2-large.yaml" in done.stderr
    assert "gpt2-medium.yaml" in done.stderr


def test_finished_runs_are_left_alone(tree: Tree) -> None:
    finished = tree.root / "results/train/gpt2-base/kd/rkl"
    finished.mkdir(parents=True)
    (finished / "status.json").write_text('{"state": "finished", "code": 0}')
    configs = train_configs(tree.dry_run("scripts/gpt2/kd/train_all.sh", TYPES="fkl rkl"))
    assert [c.objective.divergence for c in configs] == ["fkl"]


@pytest.mark.parametrize("path", EVALUATE, ids=relative)
def test_evaluation_scores_what_training_wrote(path: Path, tree: Tree) -> None:
    family, rkl = path.parts[-3], {"TYPES": "rkl"}
    trained = [
        config.run.output_dir
        for script in TRAIN
        if script.parts[-3] == family
        for config in train_configs(tree.dry_run(relative(script), **rkl))
    ]
    for folder in trained:
        (tree.root / folder / "best").mkdir(parents=True)
    assert (
        len(tree.dry_run(relative(path))) == 2 + 2 * 5
    )  # sft, seqkd, five types of kd and distill_lens
    configs = evaluate_configs(tree.dry_run(relative(path), **rkl))
    assert {f"{folder}/best" for folder in trained} == {c.checkpoint for c in configs}
    for config in configs:
        run = config.checkpoint.removesuffix("/best")
        assert config.output_dir == run.replace("results/train", "results/eval_main")


def test_evaluation_finds_training_seeds_and_given_models(tree: Tree) -> None:
    for seed in (10, 20):
        (tree.root / f"results/train/gpt2-base/kd/rkl/seed{seed}/best").mkdir(parents=True)
    script = "scripts/gpt2/eval/run_eval.sh"
    settings = {"APPROACHES": "kd", "TYPES": "rkl", "ALSO": "teacher-gpt2-1.5B", "SEEDS": "1 2 3"}
    configs = evaluate_configs(tree.dry_run(script, **settings))
    assert [(c.checkpoint, c.output_dir) for c in configs] == [
        (f"results/train/{name}/best", f"results/eval_main/{name}")
        for name in ("gpt2-base/kd/rkl/seed10", "gpt2-base/kd/rkl/seed20")
    ] + [("checkpoints/teacher-gpt2-1.5B", "results/eval_main/gpt2-base/given/teacher-gpt2-1.5B")]
    assert all(c.eval.seeds == [1, 2, 3] for c in configs)


def test_trained_runs_that_are_not_named_are_told_in_one_line(tree: Tree) -> None:
    named = ("kd/rkl", "sft/ce")
    unnamed = ("distill_lens/tvd/seed10", "kd/skew_fkl", "mine/jsd")
    for run in (*named, *unnamed):
        (tree.root / f"results/train/gpt2-base/{run}/best").mkdir(parents=True)
    script = "scripts/gpt2/eval/run_eval.sh"
    done = tree.run(script, DRY_RUN="1", APPROACHES="sft kd", TYPES="rkl")
    assert done.returncode == 0
    told = [line for line in done.stderr.splitlines() if "not named by" in line]
    paths = " ".join(f"results/train/gpt2-base/{run}/best" for run in unnamed)
    assert told == [f"Trained, but not named by APPROACHES and TYPES, left out: {paths}"]
    more = {"APPROACHES": "sft kd mine distill_lens", "TYPES": "rkl tvd skew_fkl jsd"}
    done = tree.run(script, DRY_RUN="1", **more)
    assert "not named" not in done.stderr
    assert all(f"results/train/gpt2-base/{run}/best" in done.stdout for run in unnamed)


def test_evaluation_without_models_or_sets_says_so(tree: Tree) -> None:
    done = tree.run("scripts/gpt2/eval/run_eval.sh")
    assert done.returncode == 2
    assert "no trained model" in done.stderr
    (tree.root / "results/train/gpt2-base/kd/rkl/best").mkdir(parents=True)
    done = tree.run("scripts/gpt2/eval/run_eval.sh")
    assert done.returncode == 3
    assert "data/README.md" in done.stderr


def test_evaluation_uses_the_sets_that_are_there(tree: Tree) -> None:
    (tree.root / "results/train/gpt2-base/kd/rkl/best").mkdir(parents=True)
    for name in ("dolly", "sinst/11_"):
        (tree.root / "data" / name).mkdir(parents=True)
        (tree.root / "data" / name / "valid.jsonl").write_text("{}\n")
    (tree.root / "evaluate.py").write_text("import sys\nprint(*sys.argv[1:], sep='\\n')\n")
    done = tree.run("scripts/gpt2/eval/run_eval.sh", "--limit", "5")
    assert done.returncode == 0, done.stderr
    config = load_evaluate_config(done.stdout.splitlines())
    assert (config.sets, config.limit) == (["dolly", "sinst"], 5)
    assert "data/vicuna holds no valid.jsonl" in done.stderr


@pytest.mark.parametrize("path", EVALUATE, ids=relative)
def test_every_model_is_scored_by_the_papers_protocol(path: Path, tree: Tree) -> None:
    """Five sets × five seeds, prompt and answer 512 tokens, nothing left out."""
    for config in evaluate_configs(tree.dry_run(relative(path))):
        assert config.sets == ["dolly", "self_inst", "vicuna", "sinst", "uinst"]
        assert config.limit is None  # each set as long as the paper took it
        assert config.eval.seeds == [10, 20, 30, 40, 50]
        lengths = (config.max_prompt_length, config.eval.max_new_tokens)
        assert (*lengths, config.eval.no_repeat_ngram_size) == (256, 256, 6)
        assert config.eval.do_sample and config.eval.temperature == 1.0


@pytest.mark.parametrize("path", EVALUATE, ids=relative)
def test_later_protocol_replaces_the_scripts_choices(path: Path, tree: Tree) -> None:
    quick = ("--config", "configs/eval/quick.yaml")
    configs = evaluate_configs(tree.dry_run(relative(path), *quick))
    assert configs[0].sets == ["dolly"]
    assert (configs[0].limit, configs[0].eval.seeds) == (20, [10])


ALONE, PATIENT = "torchrun --standalone --nproc_per_node", "--shutdown_timeout 600"


@pytest.mark.parametrize(
    ("gpus", "settings", "start"),
    [
        (0, {}, "python"),
        (0, {"PROCESSES": "2"}, f"{ALONE} 2 {PATIENT}"),
        (8, {}, f"{ALONE} 4 {PATIENT}"),
        (2, {}, f"{ALONE} 2 {PATIENT}"),
        (8, {"CUDA_VISIBLE_DEVICES": "3,5"}, f"{ALONE} 2 {PATIENT}"),
        (8, {"CUDA_VISIBLE_DEVICES": ""}, "python"),
        (8, {"GPUS": "1"}, "python"),
        (
            8,
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "4000"},
            f"torchrun --nnodes 2 --node_rank 1 --nproc_per_node 4 --max_restarts 0 {PATIENT} "
            "--master_addr first --master_port 4000",
        ),
    ],
)
def test_processes_follow_the_machine(
    gpus: int, settings: dict[str, str], start: str, tree: Tree
) -> None:
    tree.set_gpus(gpus)
    (command,) = tree.dry_run("scripts/gpt2/distill_lens/train_all.sh", **settings)
    assert command[0] == "env"
    assert command[1].startswith("OMP_NUM_THREADS=")
    assert command[2] == "OMP_WAIT_POLICY=passive"
    assert command[3 : command.index("train.py")] == start.split()


def test_fewer_gpus_are_told(tree: Tree) -> None:
    tree.set_gpus(2)
    done = tree.run("scripts/gpt2/distill_lens/train_all.sh", DRY_RUN="1")
    assert "gpus=4, but there are 2" in done.stderr
    assert "4/2 times their --optim.accumulation" in done.stderr


FAKE_TRAIN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run.output_dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
code = int(os.environ["FAKE_CODE"])
if os.environ.get("RANK", "0") != "0":
    time.sleep(2)  # torchrun ends the first process as soon as this one fails
elif code != 1:
    (folder / "status.json").write_text(json.dumps({"state": "failed", "code": code}))
if code == 143:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(code)
"""


@pytest.mark.parametrize(("code", "processes"), [(0, "1"), (3, "1"), (0, "2"), (3, "2"), (1, "2")])
def test_script_returns_the_runs_own_code(code: int, processes: str, tree: Tree) -> None:
    """torchrun makes 1 of every failure; the stale status of an earlier run is not believed."""
    (tree.root / "train.py").write_text(FAKE_TRAIN)
    earlier = tree.root / "results/train/gpt2-base/distill_lens/rkl/status.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"state": "failed", "code": 6}')
    os.utime(earlier, (1e9, 1e9))
    settings = {"PROCESSES": processes, "FAKE_CODE": str(code)}
    done = tree.run("scripts/gpt2/distill_lens/train_all.sh", **settings)
    assert done.returncode == code, done.stderr


def test_script_stops_at_the_first_failure(tree: Tree) -> None:
    (tree.root / "train.py").write_text(FAKE_TRAIN)
    done = tree.run("scripts/gpt2/kd/train_all.sh", TYPES="fkl rkl", FAKE_CODE="5")
    assert done.returncode == 5
    assert not (tree.root / "results/train/gpt2-base/kd/rkl").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_the_run_and_its_code_comes_back(
    number: signal.Signals, code: int, tree: Tree
) -> None:
    """SIGTERM to the script alone; Ctrl-C to the whole group, as a terminal sends it."""
    fake = FAKE_TRAIN.replace(
        "    time.sleep(60)\n",
        "    try:\n        time.sleep(60)\n    except KeyboardInterrupt:\n        os._exit(130)\n",
    )
    if number == signal.SIGINT:
        fake = fake.replace('"code": code}', '"code": 130}')
    (tree.root / "train.py").write_text(fake)
    process = subprocess.Popen(
        ["bash", "scripts/gpt2/distill_lens/train_all.sh"],
        cwd=tree.root,
        env=tree.environment(FAKE_CODE="143"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests started in the background inherit an ignored SIGINT, which bash could not trap.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        begin = time.monotonic()
        if number == signal.SIGTERM:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)
        assert process.wait(timeout=30) == code
        assert time.monotonic() - begin < 20
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
