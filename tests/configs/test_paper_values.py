"""The paper's runs: what the scripts start, against a table typed from the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from test_scripts import ROOT, Tree, evaluate_configs, train_configs

from distilllens.config import LoraConfig, TrainConfig

GPUS = 4

SCRIPTS = {
    "gpt2-base": ("gpt2", "base"),
    "gpt2-medium": ("gpt2", "medium"),
    "tinyllama": ("llama", ""),
    "qwen2.5-1.5b": ("qwen2.5", ""),
}
"""Folder under scripts/, and the MODEL to choose in its scripts."""

TEACHERS = {
    "gpt2-base": "teacher-gpt2-1.5B",
    "gpt2-medium": "teacher-gpt2-1.5B",
    "tinyllama": "SFT-Llama-7B",
    "qwen2.5-1.5b": "Qwen2.5-3B",
}
STUDENTS = {
    "gpt2-base": "gpt2-base",
    "gpt2-medium": "gpt2-medium",
    "tinyllama": "TinyLlama-1.1B",
    "qwen2.5-1.5b": "Qwen2.5-1.5B",
}


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """One row of the paper's table of runs."""

    pair: str
    approach: str
    lr: float
    batch: tuple[int, int] | int
    """Per GPU and accumulation, or where only that is known: records per step on all GPUs."""
    epochs: int
    ratio: float
    zero: int
    lora_rank: int | None = None
    checkpointing: bool = False
    layers: tuple[str, str] = ("", "")
    """Of teacher and student."""


RUNS = [
    PaperRun(
        pair="gpt2-base", approach="distill_lens", lr=2e-4, batch=(4, 1), epochs=20, ratio=1.0,
        zero=2, layers=("8 16 24 32 40", "2 4 6 8 10"),
    ),
    PaperRun(
        pair="gpt2-medium", approach="distill_lens", lr=5e-5, batch=(4, 1), epochs=20, ratio=1.0,
        zero=2, layers=("8 16 24 32 40", "4 8 12 16 20"),
    ),
    PaperRun(
        pair="tinyllama", approach="distill_lens", lr=5e-6, batch=(1, 1), epochs=10, ratio=1.0,
        zero=1, checkpointing=True, layers=("5 10 16 21 26", "4 7 11 15 18"),
    ),
    PaperRun(
        pair="qwen2.5-1.5b", approach="distill_lens", lr=1e-4, batch=(1, 1), epochs=10, ratio=1.0,
        zero=1, checkpointing=True, lora_rank=8, layers=("7 14 22 29", "6 11 17 22"),
    ),
    PaperRun(
        pair="gpt2-base", approach="kd", lr=2e-4, batch=(4, 1), epochs=20, ratio=0.5, zero=1
    ),
    PaperRun(
        pair="gpt2-medium", approach="kd", lr=1e-4, batch=(2, 4), epochs=20, ratio=0.5, zero=1
    ),
    PaperRun(
        pair="tinyllama", approach="kd", lr=1e-5, batch=(1, 1), epochs=10, ratio=0.5, zero=1
    ),
    PaperRun(
        pair="qwen2.5-1.5b", approach="kd", lr=2e-4, batch=(2, 2), epochs=10, ratio=0.5, zero=1,
        lora_rank=16,
    ),
    PaperRun(pair="gpt2-base", approach="sft", lr=5e-4, batch=(2, 1), epochs=20, ratio=0, zero=1),
    PaperRun(pair="gpt2-medium", approach="sft", lr=1e-4, batch=32, epochs=20, ratio=0, zero=1),
    PaperRun(pair="tinyllama", approach="sft", lr=1e-5, batch=4, epochs=10, ratio=0, zero=1),
    PaperRun(
        pair="qwen2.5-1.5b", approach="sft", lr=2e-4, batch=16, epochs=10, ratio=0, zero=1,
        lora_rank=8,
    ),
]  # fmt: skip
RUNS += [replace(run, approach="seqkd") for run in RUNS if run.approach == "sft"]
"""Of its SeqKD the paper gives no settings, and its scripts train on the records' answers."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("tree"))
    tree.set_gpus(2 * GPUS)
    return tree


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run.pair}-{run.approach}")
def run(request: pytest.FixtureRequest) -> PaperRun:
    return request.param


@pytest.fixture(scope="module")
def command(run: PaperRun, tree: Tree) -> list[str]:
    """What the run's script prints in a dry run."""
    family, model = SCRIPTS[run.pair]
    settings = {"MODEL": model, "TYPES": "rkl", "GENERATED": "answers"}
    (words,) = tree.dry_run(f"scripts/{family}/{run.approach}/train_all.sh", **settings)
    return words


@pytest.fixture(scope="module")
def config(command: list[str], tree: Tree) -> TrainConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree.root)
        return train_configs([command])[0]


def test_run_has_the_papers_optimisation(run: PaperRun, config: TrainConfig) -> None:
    optim = config.optim
    assert (optim.lr, optim.epochs, optim.max_steps) == (run.lr, run.epochs, None)
    if isinstance(run.batch, tuple):
        assert (optim.micro_batch_size, optim.accumulation) == run.batch
    else:
        assert optim.micro_batch_size * optim.accumulation * GPUS == run.batch
    assert (optim.schedule, optim.lr_min, optim.warmup) == ("cosine", 1e-7, 0)
    assert (optim.weight_decay, optim.clip_grad) == (1e-2, 1.0)
    assert config.deepspeed == f"configs/deepspeed/zero{run.zero}_bf16.json"
    assert config.model.dtype == "auto"
    assert config.model.gradient_checkpointing is run.checkpointing
    assert config.run.seed == 10


def test_run_has_the_papers_models_and_data(run: PaperRun, config: TrainConfig) -> None:
    assert config.model.student == f"checkpoints/{STUDENTS[run.pair]}"
    assert config.model.teacher == f"checkpoints/{TEACHERS[run.pair]}"
    assert (config.model.teacher_lora is not None) == run.pair.startswith("qwen")
    rank = run.lora_rank
    lora = None if rank is None else LoraConfig(r=rank, alpha=32.0)
    assert config.model.student_lora == lora
    assert (config.data.max_length, config.data.max_prompt_length) == (512, 256)
    assert config.eval.dev_size == (960 if run.pair.startswith("qwen") else 1000)


def test_run_has_the_papers_objective(run: PaperRun, config: TrainConfig) -> None:
    objective = config.objective
    assert (objective.approach, objective.kd_ratio) == (run.approach, run.ratio)
    if run.approach != "distill_lens":
        return
    lens = objective.lens
    teacher, student = ([int(i) for i in numbers.split()] for numbers in run.layers)
    assert (lens.teacher_layers, lens.student_layers) == (teacher, student)
    assert (objective.divergence, lens.divergence, lens.beta) == ("rkl", "jsd", 0.5)
    assert (lens.coeff, lens.norm, lens.weights) == (1.0, "final", None)


def test_run_is_on_the_papers_number_of_gpus(command: list[str]) -> None:
    assert command[command.index("--nproc_per_node") + 1] == str(GPUS)


@pytest.mark.parametrize("pair", SCRIPTS)
def test_evaluation_is_the_papers(pair: str, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.root)
    family, model = SCRIPTS[pair]
    settings = {"MODEL": model, "APPROACHES": "distill_lens", "TYPES": "rkl"}
    (config,) = evaluate_configs(tree.dry_run(f"scripts/{family}/eval/run_eval.sh", **settings))
    run = f"{STUDENTS[pair]}/distill_lens/rkl"
    assert config.checkpoint == f"results/train/{run}/best"
    sampling = config.eval
    assert (sampling.do_sample, sampling.temperature) == (True, 1.0)
    assert (sampling.top_p, sampling.top_k, sampling.no_repeat_ngram_size) == (1.0, 0, 6)
    assert config.max_prompt_length == 256
    assert config.max_prompt_length + sampling.max_new_tokens == 512
    assert sampling.seeds == [10, 20, 30, 40, 50]
    assert config.sets == ["dolly", "self_inst", "vicuna", "sinst", "uinst"]
    assert config.limit is None


def test_every_paper_file_is_a_run_of_the_table() -> None:
    names = {path.stem for path in (ROOT / "configs" / "paper").iterdir()}
    assert names == {f"{run.pair}-{run.approach}" for run in RUNS}
