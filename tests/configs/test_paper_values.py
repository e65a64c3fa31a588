"""The paper's runs: every value of configs/ against a table typed from the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from distilllens.config import LoraConfig, TrainConfig, load_config, load_evaluate_config

ROOT = Path(__file__).resolve().parents[2]
GPUS = 4

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


def load(run: PaperRun, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.chdir(ROOT)
    layers = ("base", f"models/{run.pair}", f"objectives/{run.approach}")
    names = [*layers, f"paper/{run.pair}-{run.approach}"]
    flags = [part for name in names for part in ("--config", f"configs/{name}.yaml")]
    more = ["--data.generated", "answers"] if run.approach == "seqkd" else []
    return load_config([*flags, *more])


@pytest.fixture(params=RUNS, ids=lambda run: f"{run.pair}-{run.approach}")
def run(request: pytest.FixtureRequest) -> PaperRun:
    return request.param


def test_run_has_the_papers_optimisation(run: PaperRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(run, monkeypatch)
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


def test_run_has_the_papers_models_and_data(run: PaperRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(run, monkeypatch)
    assert config.model.student == f"checkpoints/{STUDENTS[run.pair]}"
    assert config.model.teacher == f"checkpoints/{TEACHERS[run.pair]}"
    assert (config.model.teacher_lora is not None) == run.pair.startswith("qwen")
    rank = run.lora_rank
    lora = None if rank is None else LoraConfig(r=rank, alpha=32.0)
    assert config.model.student_lora == lora
    assert (config.data.max_length, config.data.max_prompt_length) == (512, 256)
    assert config.eval.dev_size == (960 if run.pair.startswith("qwen") else 1000)


def test_run_has_the_papers_objective(run: PaperRun, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = load(run, monkeypatch).objective
    assert (objective.approach, objective.kd_ratio) == (run.approach, run.ratio)
    if run.approach != "distill_lens":
        return
    lens = objective.lens
    teacher, student = ([int(i) for i in numbers.split()] for numbers in run.layers)
    assert (lens.teacher_layers, lens.student_layers) == (teacher, student)
    assert (objective.divergence, lens.divergence, lens.beta) == ("rkl", "jsd", 0.5)
    assert (lens.coeff, lens.norm, lens.weights) == (1.0, "final", None)


def test_evaluation_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_evaluate_config(["--config", "configs/eval/paper.yaml"])
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
