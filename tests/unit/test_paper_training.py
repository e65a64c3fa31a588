"""Trainings beside the paper's: its settings typed by hand, and what differs from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from distilllens.config import load_config
from distilllens.report.comparison import training
from distilllens.report.comparison.training import PaperRun, training_differences

LENS = PaperRun(pair="gpt2-base", approach="distill_lens", kind="rkl", teacher_blocks=48)
SFT = PaperRun(pair="gpt2-medium", approach="sft", kind="ce", teacher_blocks=48)
TYPED = {
    LENS: "--objective.approach distill_lens --objective.divergence rkl --objective.kd_ratio 1.0 "
    "--optim.lr 2e-4 --optim.epochs 20 --optim.micro_batch_size 4 --optim.accumulation 1 "
    "--objective.lens.teacher_layers [8,16,24,32,40] --objective.lens.student_layers [2,4,6,8,10] "
    "--model.teacher t --model.student s",
    SFT: "--objective.approach sft --objective.kd_ratio 0 --optim.lr 1e-4 --optim.epochs 20 "
    "--optim.micro_batch_size 8 --model.student s",
}
"""The paper's settings; sft: 32 records a step, here 8 on each of four GPUs."""
PAIRS = [(8, 2), (16, 4), (24, 6), (32, 8), (40, 10)]


def write_record(folder: Path, run: PaperRun, *flags: str, **changes: Any) -> Path:
    """Writes distilllens.json of a training with these flags over the paper's."""
    config = load_config([*TYPED[run].split(), *flags])
    facts = {
        "options": dataclasses.asdict(config),
        "data": {"num_train": 11_435, "file": "data/dolly/raw.jsonl"},
        "teacher": {"num_blocks": 48},
        "world_size": 4,
        "precision": "bfloat16",
        "pairs": PAIRS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "distilllens.json").write_text(json.dumps(facts | changes))
    return folder


@pytest.mark.parametrize("run", [LENS, SFT])
def test_a_training_like_the_papers_differs_in_nothing(tmp_path: Path, run: PaperRun) -> None:
    assert training_differences(write_record(tmp_path, run), run) == []


@pytest.mark.parametrize(
    ("flags", "changes", "told"),
    [
        (
            "",
            {"data": {"num_train": 400, "file": "data/dolly/raw.jsonl"}},
            "training records: 400 of data/dolly/raw.jsonl for 11,435 of dolly",
        ),
        (
            "",
            {"data": {"num_train": 11_435, "file": "data/skills/raw.jsonl"}},
            "training records: 11,435 of data/skills/raw.jsonl for 11,435 of dolly",
        ),
        ("", {"teacher": {"num_blocks": 6}}, "teacher of 6 blocks for 48"),
        ("", {"teacher": {"num_blocks": None}}, "teacher of unknown blocks for 48"),
        ("", {"world_size": 1}, "global batch 4 for 16"),
        ("", {"precision": "float32"}, "precision float32 for bfloat16"),
        ("", {"pairs": PAIRS[:1]}, "layer pairs 8–2 for 8–2 16–4 24–6 32–8 40–10"),
        ("--optim.max_steps 60", {}, "60 optimizer steps for 20 epochs"),
        ("--optim.epochs 3", {}, "3 epochs for 20"),
        ("--optim.lr 1e-3", {}, "optim.lr: 0.001 for 0.0002"),
        ("--optim.schedule constant", {}, 'optim.schedule: "constant" for "cosine"'),
        ("--data.max_length 64 --data.max_prompt_length 48", {}, "data.max_length: 64 for 512"),
        ("--objective.lens.coeff 0.5", {}, "objective.lens.coeff: 0.5 for 1.0"),
        ("--objective.divergence fkl", {}, 'objective.divergence: "fkl" for "rkl"'),
        ("--model.student_lora.r 8", {}, "an adapter was trained, not all weights"),
        ("--data.generated other/answers", {}, "trained on a teacher's answers, other/answers"),
    ],
)
def test_what_differs_is_told(
    tmp_path: Path, flags: str, changes: dict[str, Any], told: str
) -> None:
    found = training_differences(write_record(tmp_path, LENS, *flags.split(), **changes), LENS)
    assert told in found
    assert len(found) == (2 if "max_prompt_length" in flags else 1)


def test_what_fine_tuning_does_not_read_is_not_told(tmp_path: Path) -> None:
    flags = ["--objective.lens.coeff", "3", "--objective.divergence", "fkl"]
    record = write_record(tmp_path, SFT, *flags, teacher=None, pairs=[])
    assert training_differences(record, SFT) == []


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"options": {}}', '{"options": 3}'])
def test_without_a_record_the_training_is_not_known(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "distilllens.json").write_text(text)
    (told,) = training_differences(tmp_path, LENS)
    assert told.startswith("training not known")


def test_without_the_papers_settings_nothing_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CONFIGS", tmp_path / "configs")
    (told,) = training_differences(write_record(tmp_path, LENS), LENS)
    assert told == "training not compared: configs/paper is not here"
